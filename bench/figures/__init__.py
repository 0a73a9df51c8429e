"""Shows what stored scores say about one-shot multipliers: `python -m bench.figures`."""
