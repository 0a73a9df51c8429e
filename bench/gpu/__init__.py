"""Measures what only a GPU can show: `python -m bench.gpu`."""
