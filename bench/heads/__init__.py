"""Trains and checks the three shipped score heads: `python -m bench.heads`.

The jsonl files in this folder are the project's part of their training data.
"""
