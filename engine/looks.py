"""How often one may look: shares of the allowed error for each look at held-out responses.

A constraint that does not hold is called met at some look with probability of at most the sum of the looks'
errors (union bound). So each look gets a share that is fixed beforehand, and the shares of all looks that
will ever be, planned or not, sum to 1. Nothing is assumed of how looks depend on one another: they may share
prompts and responses, and the next one may be chosen by what this one showed.

The last planned look has most of it, so that its bounds are at most 1.15 times as far from the mean as those
of a single look without any correction.
"""

from dataclasses import dataclass

# Of a run's own verdict.
CONFIDENCE = 0.95
# Of the allowed error, what the first attempt spends; further attempts share the rest.
FIRST = 0.75
# Of an attempt's, what its last planned look spends; the looks before it share the rest.
LAST = 13 / 15


@dataclass(frozen=True)
class Size:
    """The held-out responses of one look, those of earlier looks of the attempt included."""

    prompts: int
    responses: int  # per prompt, of the policy and of the reference each

    @property
    def total(self) -> int:
        """The responses of either side."""
        return self.prompts * self.responses

    def __str__(self) -> str:
        return f"{self.prompts} prompts x {self.responses} responses"


def planned(first: Size, pool: int, budget: int) -> list[Size]:
    """Returns the looks that an attempt may take: twice as many responses each time, on new prompts first.

    pool: how many held-out prompts there are. budget: responses of either side at most.
    """
    looks = [first]
    while True:
        now = looks[-1]
        prompts = min(2 * now.prompts, pool, budget // now.responses)
        # A few prompts more tell little, and every look costs some of the error.
        if prompts >= 1.5 * now.prompts:
            looks.append(Size(prompts, now.responses))
        elif 2 * now.total <= budget:
            looks.append(Size(now.prompts, 2 * now.responses))
        else:
            return looks


def attempt_share(earlier: int) -> float:
    """Returns the share of an attempt that `earlier` others came before: other iterates, retrained policies
    or further evaluations on any of its prompts, or the same policy on other prompts.

    All shares sum to 1: 3/4, and then 1/4 x 1 / (m (m + 1)) for m = 1, 2, ...
    """
    return FIRST if earlier == 0 else (1 - FIRST) / (earlier * (earlier + 1))


def look_share(look: int, looks: int) -> float:
    """Returns the share of an attempt's error for look `look` (from 0) of `looks` planned ones."""
    if looks == 1:
        return 1.0
    return LAST if look == looks - 1 else (1 - LAST) / (looks - 1)


def last_error(looks: int) -> float:
    """Returns the error of a one-sided bound at the last of the looks of the first attempt."""
    return (1 - CONFIDENCE) * share(0, looks - 1, looks)


def share(earlier: int, look: int, looks: int) -> float:
    """Returns the share of 1 - confidence that a one-sided bound of a look may spend."""
    return attempt_share(earlier) * look_share(look, looks)
