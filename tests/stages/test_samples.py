"""Responses that are not sampled: of a file by --samples, and of a run with other scorers by --samples-of."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import mocan, model, train
from engine.config import MocanConfig, smoke
from engine.dual.analysis import analyse
from engine.dual.config import DualConfig
from engine.dual.scores_file import read_scores
from engine.errors import UserError
from engine.model.packing import groups
from engine.policy.samples import Samples
from engine.policy.surprise import surprise
from engine.run.committed import read_committed
from engine.run.rows import DualRow, GivenRow, SampledRow
from engine.stages import sampling
from engine.stages.inputs import model_folder
from engine.stages.job import open_job
from engine.stages.reference import ReferenceSamples
from engine.stages.run import RunStages
from engine.stages.run_inputs import owned_inputs
from engine.stages.verdict import looks
from tests.helpers.runs import SMOKE, files, write

JUDGE = """
asked = []


def variety(prompts, responses):
    asked.extend(responses)
    return [len(set(text)) / 10 for text in responses]


def shouting(prompts, responses):
    asked.extend(responses)
    return [sum(c.isupper() for c in text) / (1 + len(text)) for text in responses]
"""
RESULTS = (
    "evaluation.json",
    "heldout.jsonl",
    "metrics.jsonl",
    "adapters/iteration-1/adapter_model.safetensors",
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Makes the module `shared_judge` of two scorers; returns it."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "shared_judge.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import shared_judge

        yield shared_judge
    sys.modules.pop("shared_judge")


def config_of(out: Path, **changes) -> MocanConfig:
    return replace(smoke(MocanConfig(threads=1, force=True, out=str(out), steps=2)), **changes)


TEXTS = {"reward": "shared_judge:variety", "cost": ("loud=shared_judge:shouting",), "audit": ()}


def draw(config: MocanConfig, resume: str | None = None) -> Path:
    """Takes or samples the reference's responses to the training and the held-out prompts, as a sweep does,
    and solves the dual; returns the run's folder."""
    with open_job("samples", config, resume, n_stages=3) as job:
        stages = RunStages(job)
        stages.sample_reference()
        stages.solve_dual()
        stages.heldout(looks(job)[0])
        return job.run.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, judge, cache):
    """Returns a folder with the samples `heads`, and the whole run `texts` by other scorers."""
    folder = tmp_path_factory.mktemp("runs")
    draw(config_of(folder / "heads"))
    mocan.train(config_of(folder / "texts", **TEXTS))
    return folder


def reference_of(run: Path) -> ReferenceSamples:
    return read_committed(run).load("reference", ReferenceSamples)


def heldout_of(run: Path) -> Samples:
    return read_committed(run).load("heldout/reference", Samples)


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """Lists the numbers of prompts of each sampling."""
    numbers, generate = [], sampling.generate

    def counting(model, prompts, **options):
        numbers.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(sampling, "generate", counting)
    return numbers


def test_other_scorers_of_texts_end_bitwise_like_a_run_of_their_own(runs, tmp_path, sampled, capsys):
    mocan.train(config_of(tmp_path / "shared", samples_of=str(runs / "heads"), **TEXTS))
    for name in RESULTS:
        assert (tmp_path / "shared" / name).read_bytes() == (runs / "texts" / name).read_bytes(), name
    assert sampled == [4, 8], "the policy alone is sampled: for its KL after the update, and for the verdict"
    said = " ".join(capsys.readouterr().out.split())
    assert f"reference: reward, loud scored anew on the responses of {runs / 'heads'}" in said


def test_scorers_that_both_runs_have_are_not_asked_again(runs, tmp_path, judge, sampled, capsys):
    # Cost and audit change their places; the reward stays, and the units change.
    audits = ("harm", "loud=shared_judge:shouting")
    mixed = {"cost": ("harm-audit",), "audit": audits, "units": "raw"}
    alone = draw(config_of(tmp_path / "alone", **mixed))
    judge.asked.clear()
    sampled.clear()
    shared = draw(config_of(tmp_path / "shared", samples_of=str(runs / "heads"), **mixed))
    assert (shared / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()
    own, other = ((reference_of(run).samples, heldout_of(run)) for run in (alone, shared))
    for a, b in zip(own, other, strict=True):
        for name, score in vars(a.scores).items():
            assert torch.equal(score, vars(b.scores)[name]), name
    assert torch.equal(own[1].scaled.utility_PGJ, other[1].scaled.utility_PGJ)
    assert "reference: loud scored anew" in " ".join(capsys.readouterr().out.split())
    asked = 4 + 12 * 4 + 8 * 2  # on trial, and for the training and the held-out prompts
    assert len(judge.asked) == asked and sampled == []


def test_heads_read_the_states_that_were_kept_or_a_forward_of_their_own(runs, tmp_path):
    shared = draw(config_of(tmp_path / "shared", samples_of=str(runs / "texts")))
    own = reference_of(runs / "heads")
    assert own.lower_MD is not None
    for name, score in vars(own.samples.scores).items():
        assert torch.equal(score, vars(reference_of(shared).samples.scores)[name]), name
    # Held-out responses have no kept states.
    for name, score in vars(heldout_of(runs / "heads").scores).items():
        torch.testing.assert_close(vars(heldout_of(shared).scores)[name], score, rtol=1e-5, atol=1e-5)


def test_a_run_that_shares_is_resumed_with_its_own_scores(runs, tmp_path):
    config = config_of(tmp_path / "shared", samples_of=str(runs / "heads"), **TEXTS)
    whole = files(draw(config))
    for path in (tmp_path / "shared" / "stages").iterdir():
        path.unlink()
    assert files(draw(config, resume=config.out)) == whole


def test_other_settings_than_scorers_are_refused_still(runs, tmp_path):
    with pytest.raises(UserError, match="it has --temperature 0.7, this run has 0.9"):
        draw(config_of(tmp_path / "x", samples_of=str(runs / "heads"), temperature=0.9, **TEXTS))
    assert not (tmp_path / "x").exists()


# Words without capitals among others, so that both scorers tell the responses apart.
WORDS = ("yes", "NO", "perhaps", "Not now", "ask me", "OH WELL", "sure")


def given_rows(n: int = 12, responses: int = 3, scored: bool = True) -> list[dict]:
    """Makes rows of one response each, with scores that no scorer gives."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for p in range(n):
        for i in range(responses):
            reward, loud = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
            row = {"prompt": f"Question {p}?", "response": f"{WORDS[(p + 2 * i) % 7]} {p}"}
            rows.append(row | ({"reward": reward, "loud": loud} if scored else {}))
    return rows


@pytest.fixture(scope="module")
def given(tmp_path_factory, judge, cache):
    """Returns a folder with a file of scored samples, held-out prompts and a run on these."""
    folder = tmp_path_factory.mktemp("given")
    rows = given_rows()
    write(folder / "samples.jsonl", rows)
    write(folder / "heldout.jsonl", [{"prompt": f"Other {i}?"} for i in range(8)])
    judge.asked.clear()
    draw(given_config(folder, folder / "run"))
    assert not {row["response"] for row in rows} & set(judge.asked)
    return folder


def given_config(folder: Path, out: Path, **changes) -> MocanConfig:
    settings = {
        "samples": str(folder / "samples.jsonl"), "heldout": str(folder / "heldout.jsonl"),
        "threshold": (0.3,), "max_new_tokens": 24, **TEXTS, **changes,
    }  # fmt: skip
    return config_of(out, **settings)


def test_the_multipliers_are_those_of_the_dual_on_the_same_file(given):
    file, config = str(given / "samples.jsonl"), DualConfig(cost=("loud",), threshold=(0.3,))
    solution = analyse(file, read_scores(file, (), ("loud",), texts=False), config).solution
    (row,) = read_committed(given / "run").rows(DualRow)
    assert row.lam == pytest.approx(solution.lam.tolist(), rel=1e-6) and row.lam[0] > 0


def oracle(samples, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes log-probs [R] and summed entropies [R] of responses in float64, one at a time."""
    network = AutoModelForCausalLM.from_pretrained(model_folder("smoke"), dtype=torch.float64)
    logprobs, entropies = [], []
    for row, length in enumerate(samples.rollouts.length.tolist()):
        prompt = samples.prompts.token_ids[row // samples.rollouts.n]
        ids = torch.tensor([[*prompt, *samples.rollouts.tokens[row, :length].tolist()]])
        with torch.no_grad():
            logits = network(ids).logits[0, len(prompt) - 1 : -1] / temperature
        logprob_TV = logits.log_softmax(1)
        logprobs.append(logprob_TV.gather(1, ids[0, len(prompt) :, None]).sum())
        entropies.append(-(logprob_TV.exp() * logprob_TV).sum())
    return torch.stack(logprobs), torch.stack(entropies), samples.rollouts.length


def test_a_run_on_a_file_has_its_tokens_scores_and_log_probs(given):
    samples = reference_of(given / "run").samples
    rows = {(row["prompt"], row["response"]): row for row in given_rows()}
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smoke"))
    assert len(samples.texts) == 36 and samples.rollouts.finished.all()
    for r, text in enumerate(samples.texts):
        row = rows[samples.prompts.text[r // 3], text]
        assert float(samples.scores.reward_PG.flatten()[r]) == row["reward"]
        assert float(samples.scores.utility_PGJ.flatten()[r]) == -row["loud"]
        own = samples.rollouts.tokens[r, : int(samples.rollouts.length[r])].tolist()
        assert own == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    logprob_R, entropy_R, length_R = oracle(samples, 0.7)
    torch.testing.assert_close(samples.scores.ref_logprob_PG.flatten(), logprob_R, rtol=1e-5, atol=1e-4)
    (row,) = read_committed(given / "run").rows(GivenRow)
    few = slice(0, 8 * 3)
    assert row.logprob == pytest.approx(float(logprob_R[few].sum() / length_R[few].sum()), rel=1e-5)
    assert row.entropy == pytest.approx(float(entropy_R[few].sum() / length_R[few].sum()), rel=1e-5)


def test_a_run_on_a_file_goes_on_without_it(given, capsys):
    out = given / "run"
    whole, content = files(out), (given / "samples.jsonl").read_bytes()
    for path in (out / "stages").iterdir():
        path.unlink()
    (given / "samples.jsonl").unlink()
    try:
        assert files(draw(given_config(given, out), resume=str(out))) == whole
    finally:
        (given / "samples.jsonl").write_bytes(content)
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"--samples {given / 'samples.jsonl'} is gone since the run began" in said
    rewards = torch.tensor([row["reward"] for row in given_rows()]).view(12, 3)
    spread = float((rewards - rewards.mean(1, keepdim=True)).square().sum(1).div(2).mean().sqrt())
    assert f"reward has a standard deviation of {spread:.3g} within prompts; its scorer gives" in said
    assert list(owned_inputs(out).record.sources["--samples"]) == [str(given / "samples.jsonl")]


def test_what_a_file_lacks_is_scored_and_a_fifth_of_its_prompts_held_out(given, tmp_path, judge, capsys):
    rows = [{k: v for k, v in row.items() if k != "reward"} for row in given_rows(n=15)]
    rows += [
        {"prompt": "Question 0?", "response": "one more", "loud": 1.0},
        {"prompt": "Alone?", "response": "x", "loud": 0},
    ]
    write(tmp_path / "samples.jsonl", rows)
    draw(given_config(tmp_path, tmp_path / "run", heldout="", max_new_tokens=6))
    said = " ".join(capsys.readouterr().out.split())
    name = tmp_path / "samples.jsonl"
    taken = "15 prompts with 3 responses each, the first of the 3 to 4 there (see --n-responses)"
    assert f"{name}: {taken}; scores of loud are given, scored here: reward" in said
    assert (
        f"{name}: left out of 47 rows: 1 with a single response to their prompt (--strict refuses them)"
        in said
    )
    assert "responses are longer than --max-new-tokens 6 and were cut" in said
    record = owned_inputs(tmp_path / "run").record
    assert len(record.heldout) == 3 and len(record.samples.prompts) == 12
    samples = reference_of(tmp_path / "run").samples
    assert samples.scores.reward_PG.flatten().tolist() == [len(set(text)) / 10 for text in samples.texts]
    assert samples.rollouts.length.max() == 6 and not samples.rollouts.finished.all()


def test_samples_that_are_not_the_references_are_warned_of(given, tmp_path, capsys):
    draw(given_config(given, tmp_path / "cold", temperature=0.02, steps=1))
    out, err = capsys.readouterr()
    said = " ".join((out + err).split())
    assert "mean log-prob -" in said and "so these are not its samples at --temperature 0.02" in said


def test_the_references_own_samples_are_as_likely_as_they_should_be(runs):
    """Its own would be refused by nobody: log-prob and minus entropy differ by chance alone."""
    samples = reference_of(runs / "heads").samples
    found = surprise(model.load(model_folder("smoke")), groups(samples.prompts, samples.rollouts), 0.7)
    assert abs(found.logprob + found.entropy) < 3 * found.se < 0.5


def test_a_sweep_takes_the_samples_of_a_file_once(given, tmp_path):
    run = tmp_path / "shares"
    draw(given_config(given, run, samples_of=str(given / "run"), threshold=(0.2,)))
    assert owned_inputs(run).record.samples is None and not read_committed(run).rows(GivenRow)
    assert {row.stage for row in read_committed(run).rows(SampledRow)} == {"heldout/reference"}
    assert torch.equal(
        reference_of(run).samples.scores.reward_PG, reference_of(given / "run").samples.scores.reward_PG
    )
    other = given_config(given, tmp_path / "x", samples_of=str(given / "run"), cost=("harm",))
    with pytest.raises(UserError, match="its responses are those of --samples .* give that file instead"):
        draw(other)


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ({4: {"loud": None}}, [], ":5: column 'loud' holds None; give a finite number"),
        ({4: {"reward": float("nan")}}, [], ":5: column 'reward' holds nan; give a finite number"),
        ({4: {"response": 3}}, [], ":5: response is 3; give text"),
        ({4: {"responses": "yes"}}, [], ":5: responses is 'yes'; give a list of texts"),
        ({4: {"responses": ["a", "b"]}}, [], ":5: 1 value(s) of reward for 2 response(s); give one of each"),
        ({0: {"prompt": "Alone?"}}, ["--strict"], ":1: one response to this prompt, and at least 2"),
        ({0: {"prompt": "Question 1?"}}, ["--strict"], ":2: 2 responses to the prompt 'Question 0?', and 4"),
        ({}, ["--prompts", "p.jsonl"], "--prompts p.jsonl: the training prompts are those of --samples"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_line(tmp_path, judge, capsys, change, flags, says):
    rows = [row | change.get(i, {}) for i, row in enumerate(given_rows())]
    file = write(tmp_path / "samples.jsonl", rows)
    scorers = ["--reward", TEXTS["reward"], "--cost", *TEXTS["cost"], "--audit"]
    words = ["mocan", *SMOKE, "--samples", file, *scorers, "--out", str(tmp_path / "run"), *flags]
    assert train.main(words) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_column_is_there_in_all_rows_or_in_none(tmp_path, judge, capsys):
    rows = given_rows()
    del rows[7]["loud"]
    file = write(tmp_path / "samples.jsonl", rows)
    words = ["mocan", *SMOKE, "--samples", file, "--cost", *TEXTS["cost"], "--out", str(tmp_path / "run")]
    assert train.main(words) == 2
    assert ":8: but no column 'loud', unlike the rows before" in capsys.readouterr().err
