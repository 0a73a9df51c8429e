"""Which verdicts share the error of a policy and of prompts."""

import pytest
import torch

from engine.records import Prompts
from engine.run import judged
from engine.run.contents import Contents
from engine.run.folder import RunFolder
from engine.run.judged import Attempt, earlier


def prompts(*texts: str) -> Prompts:
    return Prompts(
        text=list(texts),
        kind=[""] * len(texts),
        token_ids=[[1]] * len(texts),
        key_P=torch.arange(len(texts)),
    )


def begin(paths: RunFolder, attempt: Attempt) -> int:
    """Counts the verdicts before one and notes it."""
    count = earlier(paths, attempt)
    judged.begin(paths, attempt, count)
    return count


def contents(**config) -> Contents:
    return Contents(algorithm="caid", config=config, fingerprint="f", versions={}, inputs="")


@pytest.fixture
def runs(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    return [RunFolder(folder) for folder in folders]


def test_a_retrained_policy_shares_prompts_and_another_iterate_the_run(runs):
    a, b, c = runs
    first = Attempt.of(contents(seed=0, out="a"), 5, prompts("one", "two"), 0)
    assert begin(a, first) == 0
    retrained = Attempt.of(contents(seed=1, out="b"), 5, prompts("two", "three"), 1)
    assert earlier(b, retrained) == 1
    assert begin(b, retrained) == 1
    other_iterate = Attempt.of(contents(seed=0, out="a"), 4, prompts("one"), 0)
    assert begin(a, other_iterate) == 1
    fresh = Attempt.of(contents(seed=0, out="a"), 5, prompts("four"), 7)
    assert begin(a, fresh) == 1  # the same policy on other prompts
    unrelated = Attempt.of(contents(seed=9, out="c"), 1, prompts("five"), 9)
    assert begin(c, unrelated) == 0


def test_an_equal_verdict_is_the_same_one(runs):
    a, b, _ = runs
    first = Attempt.of(contents(seed=0, out="a", threads=1), 5, prompts("one", "two"), 0)
    same = Attempt.of(contents(seed=0, out="b", threads=2), 5, prompts("two", "one"), 0)
    assert begin(a, first) == 0 and begin(a, first) == 0
    assert a.judged.read_text().count("\n") == 1
    assert begin(b, same) == 0 and first.id == same.id
    later = Attempt.of(contents(seed=3, out="b"), 5, prompts("one"), 3)
    assert begin(b, later) == 1
    # What came later does not change what a resumed run counted.
    assert begin(a, first) == 0 and earlier(b, later) == 1


def test_runs_of_a_sweep_do_not_count_one_another(runs):
    a, b, _ = runs
    (a.path.parent / judged.SWEEP).write_text("{}")
    assert begin(a, Attempt.of(contents(seed=0), 1, prompts("one"), 0)) == 0
    assert begin(b, Attempt.of(contents(seed=1), 1, prompts("one"), 1)) == 0
    assert begin(b, Attempt.of(contents(seed=1), 2, prompts("one"), 1)) == 1


def test_damaged_lines_are_left_out(runs):
    a, b, _ = runs
    begin(a, Attempt.of(contents(seed=0), 1, prompts("one"), 0))
    a.judged.write_text("{cut\n" + a.judged.read_text() + '{"prompts": 3}\n')
    assert earlier(b, Attempt.of(contents(seed=1), 1, prompts("one"), 1)) == 1


def test_the_runs_own_verdict_counts_without_the_file(runs):
    a = runs[0]
    own = Attempt.of(contents(seed=0), 5, prompts("one"), 0)
    again = Attempt.of(contents(seed=0), 5, prompts("two"), 1000)
    assert (earlier(a, again), earlier(a, again, own), earlier(a, own, own)) == (0, 1, 0)
    begin(a, own)
    assert earlier(a, again, own) == 1
