"""Compares CAID with MoCAN over seeds and thresholds: `python -m bench.study`."""
