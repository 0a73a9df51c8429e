"""Rows of a sweep's table, as bench.study reads them."""


def row(algorithm: str, seed: int, b: float, harm: float, error: str = "") -> dict:
    """Returns the row of a run with one constraint and one audit."""
    return {
        "algorithm": algorithm,
        "seed": str(seed),
        "harm threshold": str(b),
        "harm": str(harm),
        "harm se": "0.05",
        "harm low": "0",
        "harm high": "1",
        "reward": "0.1",
        "reward se": "0.05",
        "reward low": "0",
        "reward high": "1",
        "audit other": "0.2",
        "audit other low": "0",
        "audit other high": "1",
        "harm lambda": "1",
        "harm verdict": "met",
        "kl nats": "1.5",
        "sampled tokens": "10",
        "reference tokens": "100",
        "policy steps": "5",
        "seconds": "3.5",
        "prompts": "208",
        "responses": "8",
        "error": error,
    }


def with_another_cost(row: dict) -> dict:
    """Returns the row of a run that has a second constraint."""
    return {
        **row,
        "other threshold": "0.3",
        "other lambda": "2",
        "other verdict": "met",
        "other": "0.4",
        "other low": "0",
        "other high": "1",
    }


# At seeds 0, 1, 2 CAID ends 0.1, 0.2, 0.3 above b, MoCAN twice as far below it.
ROWS = [
    row(label, seed, b, b + sign * (0.1 + 0.1 * seed))
    for label, sign in (("caid", 1), ("mocan", -2))
    for seed in (0, 1, 2)
    for b in (0.2, 0.4)
]
