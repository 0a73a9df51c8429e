"""Trains and checks the three shipped score heads: `python -m bench.heads`. The jsonl files are part of their training data."""
