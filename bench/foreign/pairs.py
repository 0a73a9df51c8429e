"""The pairs of reward and cost, the thresholds, and what is measured: fixed before any run."""

from typing import NamedTuple

THRESHOLDS = (0.2, 0.4)
# Flags of engine.train: the papers' plain rules, as they were the defaults before runs were made to hold, and
# today's defaults.
RULES = {
    "plain": [
        *("--max-kl-ratio", "inf", "--least-weight", "0", "--dual-rule", "newton"),
        *("--adam-beta1", "0.9", "--weight-average", "0", "--beta", "1", "--slack-responses", "3"),
    ],
    "defaults": [],
}
# Further looks tell more of the same policy.
ONE_LOOK = ("--eval-budget", "1")
# A policy has run away where its KL is above this multiple of the tilt's, plus half a nat for what G
# responses cannot show of the tilt; where this share of answers is no longer finished; or where a step's loss
# is this multiple of the median one.
FAR, SLACK_NATS, UNFINISHED, SPIKE = 2.0, 0.5, 0.2, 20.0


class Pair(NamedTuple):
    """A reward and a cost; both are functions of `bench.foreign.scorers`, or scorers of the project."""

    reward: str
    cost: str

    def __str__(self) -> str:
        return f"{self.reward} against {self.cost}"


def _named(text: str) -> list[Pair]:
    return [Pair(*line.split()) for line in text.strip().splitlines()]


# A minus asks for the opposite.
PAIRS = _named("""
sentiment word_length
length -variety
variety -length
-reading_ease length
hedging length
-compression punctuation
sentiment first_person
first_person hedging
questions digits
copying -reading_ease
random_head questions
-random_head heavy_tail
helpfulness length
helpfulness -hedging
word_length harm
""")


def spec(name: str) -> str:
    """Returns how --reward or --cost names a scorer."""
    sign, bare = ("-", name[1:]) if name.startswith("-") else ("", name)
    if bare in ("helpfulness", "harm"):
        return f"{bare}={sign}{bare}" if sign else bare
    return f"{'less_' if sign else ''}{bare}={sign}bench.foreign.scorers:{bare}"
