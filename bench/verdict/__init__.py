"""Measures what the verdicts and intervals hold: `python -m bench.verdict`."""
