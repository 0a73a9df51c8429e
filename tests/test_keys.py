"""No two purposes of random numbers of one run have the same key."""

from itertools import chain

import torch

from engine import keys
from kernels.random import combine

ITERATIONS = 1000
# OPD has two updates in an iteration, and an update 0 exists.
UPDATES = range(2 * ITERATIONS + 1)


def purposes_of_samples() -> dict[str, int]:
    """Lists every purpose of a run and of its evaluation that is combined with the seed alone."""
    return {
        **{
            name: value
            for name, value in vars(keys).items()
            # `ONCE` stands for a step, in the keys of labels.
            if name.isupper() and isinstance(value, int) and name != "ONCE"
        },
        **{f"slack {t}": keys.slack(t) for t in UPDATES if t},
        **{f"fresh {t}": keys.fresh(t) for t in UPDATES},
        **{f"preference {i}": keys.preference(i) for i in range(1000)},
        **{f"selection {number}": keys.selection(number) for number in range(2, len(UPDATES) + 2)},
    }


def test_the_table_has_every_single_purpose():
    names = {"REFERENCE", "HELDOUT_REFERENCE", "HELDOUT_POLICY", "LOOKALIKE_REFERENCE", "LOOKALIKE_POLICY"}
    assert names | {"SELECTION_REFERENCE"} <= purposes_of_samples().keys()


def test_no_two_purposes_of_samples_meet():
    purposes = purposes_of_samples()
    assert len(purposes) > 7000 and len(set(purposes.values())) == len(purposes)
    # Nor do the keys that the sampler is given, here those of three seeds that follow one another.
    purpose = torch.tensor(list(purposes.values()))
    seeds = torch.arange(3)[:, None].expand(3, len(purpose))
    assert len(combine(seeds, purpose).unique()) == 3 * len(purpose)


def test_no_two_steps_draw_their_labels_alike():
    steps = [0, 1, 2, 10_000, keys.ONCE, 1_000_002]
    labels = [keys.label(t, step) for t in UPDATES for step in steps]
    assert len(set(labels)) == len(labels)
    assert keys.label(3, 1_000_002) < keys.label(4, 0), "the next update begins after a million steps"


def test_no_two_choices_among_prompts_are_keyed_alike():
    choices = [keys.TRAINING_PROMPTS, keys.HELDOUT_PROMPTS, keys.SPLIT, keys.DECK, keys.PAIRS]
    assert len(choices) == sum(isinstance(value, str) for name, value in vars(keys).items() if name.isupper())
    passes = chain.from_iterable((keys.epoch(f"iteration-{t}", n) for n in range(20)) for t in UPDATES)
    texts = [*choices, *passes]
    assert len(set(texts)) == len(texts) > 40_000
