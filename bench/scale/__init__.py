"""Predicts what a run on many GPUs needs and how well they are used, and counts what its ranks send:
`python -m bench.scale`."""
