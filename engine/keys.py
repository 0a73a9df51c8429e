"""Every purpose of random numbers in one table.

Two parts of a run draw equal numbers only where they have equal keys. Responses of a policy are keyed by
(seed, purpose, prompt, sample, step): the purposes of one seed must differ, the rest follows from the
prompts. Choices among prompts are keyed by a text.
"""

# Purposes of sampled responses: `combine(seed, purpose)` keys them together with the prompts' own keys.
REFERENCE = 0
HELDOUT_REFERENCE = -1
HELDOUT_POLICY = -2
LOOKALIKE_REFERENCE = -3
LOOKALIKE_POLICY = -4
SELECTION_REFERENCE = -5
# Of all sets of a profile: a prompt that is in two of them has the same responses in both.
PROFILE_REFERENCE = 3_000_000
PROFILE_POLICY = 3_000_001


def slack(iteration: int) -> int:
    """Keys the responses on which the slack of an iteration (from 1) is measured."""
    return iteration


def fresh(iteration: int) -> int:
    """Keys the policy's own responses from which the update of an iteration learns."""
    return 1_000_000 + iteration


def preference(number: int) -> int:
    """Keys the labels and the order of prompts of the policy aligned to preference
    `number` (0 is the reward)."""
    return 2_000_000 + number


def trust(iteration: int, time: int) -> int:
    """Keys the responses on which it is measured how far an update took its policy, again each time that it
    is taken back; there are fewer than 16 of them."""
    return 5_000_000 + 16 * iteration + time


def look(purpose: int, number: int) -> int:
    """Keys further responses to prompts that have answered at a look before look `number` (from 2); the
    purpose is `HELDOUT_REFERENCE` or `HELDOUT_POLICY`."""
    return 4_000_000 + 2 * number + purpose - HELDOUT_POLICY


def selection(number: int) -> int:
    """Keys the responses of the iterate that is tried as `number` (from 2) when
    the best feasible one is chosen."""
    return SELECTION_REFERENCE - number


def label(iteration: int, step: int) -> int:
    """Keys the labels and the dropout that a policy step draws; no step has the number `ONCE`."""
    return iteration * 1_000_003 + step


# In place of a step: keys the labels that an update draws once for all its steps.
ONCE = 1_000_001


# Purposes of choices among prompts, see `engine.data.dealing.subset`.
TRAINING_PROMPTS = "reference"
HELDOUT_PROMPTS = "heldout"
SPLIT = "split"
DECK = "deck"
PAIRS = "pairs"


def epoch(purpose: str, number: int) -> str:
    """Keys pass `number` (from 0) over the prompts of an update."""
    return f"{purpose}/epoch-{number}"
