"""Simulates how often verdicts err and how many prompts they need: `python -m bench.verdict`."""
