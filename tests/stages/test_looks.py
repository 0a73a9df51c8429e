"""A verdict that looks again: at new prompts first, then at new responses to the same ones."""

import json

import pytest
import torch

from engine import train
from engine.config import RunConfig
from engine.constraints import Improvement, MeanCost, Rate, check_confirmable
from engine.errors import UserError
from engine.intervals import betting, estimate
from engine.policy.samples import Samples
from engine.run.committed import read_committed
from engine.verdict.evaluation import Evaluation
from tests.helpers.runs import SMOKE, write

ASKED = ["mocan", *SMOKE, "--eval-prompts", "24"]


def verdict(run) -> Evaluation:
    return Evaluation.read(run / "evaluation.json", cure="")


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("looks")


@pytest.fixture(scope="module")
def once(folder):
    assert train.main([*ASKED, "--eval-budget", "48", "--out", str(folder / "once" / "run")]) == 0
    return folder / "once" / "run"


@pytest.fixture(scope="module")
def twice(folder):
    assert train.main([*ASKED, "--eval-budget", "96", "--out", str(folder / "twice" / "run")]) == 0
    return folder / "twice" / "run"


def test_a_second_look_takes_new_prompts_and_keeps_the_first_ones_responses(once, twice):
    first, second = verdict(once), verdict(twice)
    assert [(x.prompts, x.responses, x.planned) for x in first.looks] == [(24, 2, 1)]
    assert [(x.prompts, x.responses, x.planned) for x in second.looks] == [(24, 2, 2), (48, 2, 2)]
    assert first.looks[0].share == 0.75 and [x.share for x in second.looks] == pytest.approx([0.1, 0.65])
    assert (second.n_prompts, second.n_responses) == (48, 2)
    assert rows(twice)[:48] == rows(once) and len(rows(twice)) == 96
    assert len({row["prompt"] for row in rows(twice)}) == 48


def test_the_second_looks_bounds_are_those_of_all_responses_or_of_the_look_before(once, twice):
    gain = [row["policy_utility"][0] - row["reference_utility"][0] for row in rows(twice)]
    per_prompt = torch.tensor(gain, dtype=torch.float64).view(48, 2).mean(1)
    looks = [
        estimate(per_prompt[:24], alpha=0.05 * 0.1),
        estimate(per_prompt, alpha=0.05 * 0.65),
    ]
    found = verdict(twice)
    closed = max(e.lower for e in looks), min(e.upper for e in looks)
    assert found.looks[0].bounds[0] == pytest.approx((looks[0].lower, looks[0].upper))
    assert found.looks[1].bounds[0] == pytest.approx(closed)
    judged = found.constraints[0]
    assert (judged.estimate.lower, judged.estimate.upper) == pytest.approx(closed)
    assert judged.estimate.mean == pytest.approx(per_prompt.mean().item())


def test_a_run_that_lost_its_second_look_takes_it_again(twice):
    names = ("evaluation.json", "heldout.jsonl", "metrics.jsonl", "judged.jsonl")
    whole = {name: (twice / name).read_bytes() for name in names}
    last = sorted((twice / "stages").glob("*heldout-policy-2.safetensors"))
    last[0].unlink()
    (twice / "evaluation.json").unlink()
    assert train.main(["--resume", str(twice)]) == 0
    assert {name: (twice / name).read_bytes() for name in names} == whole


def test_without_further_prompts_the_same_ones_answer_anew(folder):
    prompts, run = folder / "h.jsonl", folder / "same" / "run"
    write(prompts, [{"prompt": f"What is {i}?"} for i in range(24)])
    asked = [*ASKED, "--heldout", str(prompts), "--eval-budget", "96", "--out", str(run)]
    assert train.main(asked) == 0
    found = verdict(run)
    assert [(x.prompts, x.responses) for x in found.looks] == [(24, 2), (24, 4)]
    committed = read_committed(run)
    for side in ("reference", "policy"):
        first, more = (committed.load(f"heldout/{side}{part}", Samples) for part in ("", "-2"))
        assert not set(map(tuple, first.rollouts.tokens.tolist())) & set(
            map(tuple, more.rollouts.tokens.tolist())
        )
        texts = [row[side] for row in rows(run)]
        for p in range(24):
            assert texts[4 * p : 4 * p + 4] == first.texts[2 * p : 2 * p + 2] + more.texts[2 * p : 2 * p + 2]
        both = first.and_more(more, same_prompts=True)
        assert both.rollouts.n == 4 and both.kl_PG.shape == (24, 4)
        assert both.rollouts.length.view(24, 4)[:, 2:].equal(more.rollouts.length.view(24, 2))
        assert both.scores.reward_PG[:, 2:].equal(more.scores.reward_PG)
        assert both.scaled.utility_PGJ[:, :2].equal(first.scaled.utility_PGJ)


def test_the_defaults_look_at_96_prompts_first_and_at_most_at_384():
    assert [str(size) for size in RunConfig().looks(416)] == [
        "96 prompts x 6 responses",
        "192 prompts x 6 responses",
        "384 prompts x 6 responses",
    ]


def prompts_of(n: int):
    from engine.records import Prompts

    return Prompts(text=["x"] * n, kind=[""] * n, token_ids=[[1]] * n, key_P=torch.arange(n))


def test_a_limit_that_no_outcome_can_confirm_is_refused_with_the_number_that_could():
    limit, alpha = Rate(name="unsafe", value=0.02), 0.05 * 0.65
    with pytest.raises(UserError, match="--cost-rate 0.02: 96 held-out prompts cannot confirm it") as error:
        check_confirmable([limit], prompts_of(96), alpha)
    enough = int(str(error.value).split("it takes ")[1].split()[0])
    assert betting.upper_bound(torch.zeros(1, enough, dtype=torch.float64), alpha).item() <= 0.02
    check_confirmable([limit], prompts_of(enough), alpha)
    with pytest.raises(UserError, match="cannot confirm"):
        check_confirmable([limit], prompts_of(enough - 1), alpha)
    for other in (MeanCost(name="c", value=0.02), Improvement(name="c", value=0.02, costs_within=(0, 1))):
        check_confirmable([other], prompts_of(5), alpha)
    stated = MeanCost(name="c", value=-4.9, costs_within=(-5.0, 5.0))
    with pytest.raises(UserError, match="--cost-mean -4.9: 96 .* the bound is -4.6"):
        check_confirmable([stated], prompts_of(96), alpha)


@pytest.mark.parametrize("text", ["0", "1:0", "a:b", "0:inf", "0:1:2", "nan:1"])
def test_a_range_is_two_numbers(text, capsys):
    assert train.main(["mocan", *SMOKE, f"--cost-range={text}"]) == 2
    assert f"--cost-range {text}: must be two numbers LOW:HIGH" in capsys.readouterr().err
