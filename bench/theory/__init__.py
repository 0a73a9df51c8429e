"""Checks the algorithms and the papers' bounds on problems in which everything is enumerated:
`python -m bench.theory`."""
