"""Whole smoke runs, evaluations and sweeps on several ranks: those of one process up to rounding, equal ones
bit for bit, also when they are stopped or a rank is killed; and what is refused."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import engine.caid  # noqa: F401, imported before the forks
from engine import train
from engine.config import EvaluateConfig
from engine.errors import Interrupted, LostRank, NonFiniteError, UserError
from engine.model.tokenizer import load_tokenizer
from engine.ranks import Ranks
from engine.records import Prompts
from engine.report import panels  # noqa: F401
from engine.run import plan
from engine.run.store import read_whole
from engine.stages.evaluate import run_evaluation
from engine.stages.profile import run_profile
from engine.stages.shares import by_shares
from engine.stages.smoke import smoke_folder
from engine.sweep.plans import SweepConfig
from engine.sweep.runs import run_sweep
from tests.helpers.rank_runs import ODD, at_the_second_step, run, same
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import files, write

CAID = ["caid", *ODD, "--audit", "vowels=tests.helpers.scorers:vowels"]
FEW = ["caid", "--slack-prompts", "3", "--eval-prompts", "3", "--iterations", "2"]
LEARN = [
    "mocan",
    *ODD[:2],
    *ODD[4:6],
    "--steps",
    "2",
    "--audit",
    "codes=tests.helpers.scorers:codes",
    "--force",
]
# PeCAN's scores are differences of log-probs in units of their spread. After two steps that is 0.17 nats, and
# the rounding of log-probs counts for so much more that losses part by 1.1e-5.
OTHERS = {
    "primal_dual": ["primal_dual", "--iterations", "2"],
    "pecan": ["pecan", "--preference-steps", "12", "--force"],
}
PAIRS = [{"prompt": f"Say {i}.", "response_0": "aaaa" * (i + 1), "response_1": "bbb"} for i in range(7)]


class Runs:
    """Makes runs when they are asked for first: FOLDER/RANKS/NAME/run. None stands beside another one, whose
    verdict would be an earlier one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, ranks: str, name: str) -> Path:
        out = self.folder / ranks / name / "run"
        if not out.exists():
            flags = [*self.flags(name), "--out", str(out)]
            if ranks == "one":
                run(Ranks(), *flags)
            else:
                size = 4 if ranks == "four" else 2
                assert on_ranks(size, lambda ranks: run(ranks, *flags)) == [None] * size
        return out

    def flags(self, name: str) -> list[str]:
        """Returns the algorithm and the flags of a run."""
        if name != "learn":
            return {"caid": CAID, "few": FEW, **OTHERS}[name]
        pairs = write(self.folder / "pairs.jsonl", PAIRS)
        return [*LEARN, "--samples-of", str(self("one", "caid")), "--pairs", pairs]


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache) -> Runs:
    load_tokenizer(smoke_folder())
    plan.matmul_rate(torch.float32, torch.device("cpu"))
    return Runs(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("ranks", "name"),
    [("two", "caid"), ("two", "primal_dual"), ("two", "pecan"), ("two", "learn"), ("four", "few")],
)
def test_a_run_on_ranks_is_that_of_one_process(made, ranks, name):
    same(made("one", name), made(ranks, name))


def test_a_stopped_run_goes_on_bitwise_equal(made, tmp_path):
    """So are equal runs that nothing stops. Ctrl-C reaches one rank alone: both end after the next step,
    which is saved."""
    out = tmp_path / "stopped"
    prepare = at_the_second_step(lambda: os.kill(os.getpid(), signal.SIGINT))

    def stopped(ranks: Ranks) -> None:
        prepare(ranks)
        run(ranks, *CAID, "--out", str(out))

    first, second = on_ranks(2, stopped)
    for error in (first, second):
        assert isinstance(error, Interrupted) and str(error) == f"stopped; go on with --resume {out}"
    (partial,) = out.glob("stages/*.partial.safetensors")
    assert len(read_whole(partial)[1]["record"]["fields"]["losses"]) == 3
    assert on_ranks(2, lambda ranks: run(ranks, "caid", "--resume", str(out))) == [None, None]
    whole, resumed = files(made("two", "caid")), files(out)
    assert [name for name in whole.keys() | resumed.keys() if whole.get(name) != resumed.get(name)] == []
    assert json.loads(whole["config.json"])["versions"]["ranks"] == "2"


def test_a_rank_is_killed_and_one_process_goes_on(made, tmp_path, capsys):
    out = tmp_path / "killed"
    prepare = at_the_second_step(lambda: os.kill(os.getpid(), signal.SIGKILL))

    def killed(ranks: Ranks) -> None:
        prepare(ranks)
        run(ranks, *CAID, "--out", str(out))

    survivor, gone = on_ranks(2, killed)
    assert isinstance(survivor, LostRank) and isinstance(gone, ChildProcessError)
    assert train.main(["--resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert "resumed with other versions of ranks" in said
    same(made("one", "caid"), out)


@pytest.mark.parametrize(
    ("size", "words", "said"),
    [
        (
            4,
            ["mocan", "--n-prompts", "3"],
            "4 ranks share out 3 training prompts, so some would never work: start at most 3",
        ),
        (
            2,
            ["caid", "--seed", "RANK"],
            "--seed: rank 1 has 1, rank 0 has 0; start all ranks with the same command",
        ),
        (
            2,
            ["caid", "--tune", "full", "--learning-rate", "1e-5", "--dtype", "float16"],
            "--dtype float16: with --tune full on 2 ranks it has not been tried",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused_on_all_before_there_is_a_folder(tmp_path, cache, size, words, said):
    out = tmp_path / "refused"

    def refused(ranks: Ranks) -> None:
        own = [str(ranks.rank) if flag == "RANK" else flag for flag in words]
        run(ranks, *own, "--out", str(out))

    for error in on_ranks(size, refused):
        assert isinstance(error, UserError) and str(error).startswith(said), error
    assert not out.exists()


def test_a_scorer_that_fails_on_one_rank_ends_the_run_with_its_own_words(tmp_path, cache):
    """Rank 1 alone meets the prompt; the other one does not wait for it."""
    (tmp_path / "picky.py").write_text(
        "def score(prompts, responses):\n"
        "    if len(responses) > 4 and any('second' in p for p in prompts):\n"
        "        raise RuntimeError('no such prompt')\n"
        "    return [len(r) + 0.5 * i for i, r in enumerate(responses)]\n"
    )
    prompts = write(
        tmp_path / "p.jsonl", [{"prompt": f"{'first' if i < 30 else 'second'} {i}"} for i in range(60)]
    )

    def fail(ranks: Ranks) -> None:
        sys.path.insert(0, str(tmp_path))  # in the rank's own process
        flags = ["--prompts", prompts, "--n-prompts", "40", "--audit", "picky=picky:score"]
        try:
            run(ranks, "caid", *flags, "--out", str(tmp_path / "run"))
        finally:
            # A process that has failed ends, and with it its connections.
            ranks.leave()

    results = on_ranks(2, fail)
    kinds = {type(error) for error in results}
    assert UserError in kinds and kinds <= {UserError, LostRank}, results
    assert any("no such prompt" in str(error) for error in results), results


def close(found: object, expected: object, path: str = "") -> None:
    """Compares JSON: numbers up to float32 rounding, all else exactly. A bound of three prompts lets the
    rounding of their means count many times: 3.6e-5 was found, with AVX-512."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            close(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            close(one, other, f"{path}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=6e-5), path
    else:
        assert found == expected, path


@pytest.mark.parametrize("size", [2, 4])
def test_an_evaluation_on_ranks_is_that_of_one_process(made, tmp_path, size):
    """Of 4 ranks one has no prompt to choose the iterate on."""
    run, out = made("one", "caid"), tmp_path
    flags = {
        "audit": ("codes=tests.helpers.scorers:codes", "refusal=tests.helpers.scorers:vowels"),
        "best_feasible": size == 2,
        "n_prompts": 3 if size == 4 else 0,
        "threads": 1,
    }
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Say {i} again."} for i in range(5)])

    def judged(ranks: Ranks, name: str) -> str:
        asked = EvaluateConfig(**flags, prompts=prompts, out=str(out / name))
        return run_evaluation(run, asked, ranks)[0].evaluation.constraints[0].word

    word = judged(Ranks(), "one")
    assert on_ranks(size, lambda ranks: judged(ranks, "many")) == [word] * size
    one, many = files(out / "one"), files(out / "many")
    assert one.keys() == many.keys() and len(one) == 4
    found, expected = (json.loads(all_files["evaluation.json"]) for all_files in (many, one))
    close(found, expected)
    for found, expected in zip(*(text["heldout.jsonl"].splitlines() for text in (many, one)), strict=True):
        close(json.loads(found), json.loads(expected))


def test_a_profile_on_ranks_is_that_of_one_process(made, tmp_path, monkeypatch):
    rows = [{"prompt": f"Ask {i}.", "kind": "safe" if i % 2 else "unsafe"} for i in range(5)]
    prompts = write(tmp_path / "set.jsonl", rows)
    (tmp_path / "p.yaml").write_text(
        f"sets:\n- {{name: own, source: {prompts}, label: kind, safe: [safe], unsafe: [unsafe]}}\n"
    )
    run = made("one", "caid")

    def judged(ranks: Ranks, name: str) -> None:
        flags = EvaluateConfig(profile=str(tmp_path / "p.yaml"), threads=1, out=str(tmp_path / name))
        run_profile(run, flags, ranks)

    judged(Ranks(), "one")
    assert on_ranks(2, lambda ranks: judged(ranks, "many")) == [None, None]
    one, many = files(tmp_path / "one"), files(tmp_path / "many")
    assert one.keys() == many.keys()
    close(*(json.loads(all_files["profile.json"]) for all_files in (many, one)))
    for found, expected in zip(*(text["responses.jsonl"].splitlines() for text in (many, one)), strict=True):
        close(json.loads(found), json.loads(expected))


def test_a_sweep_on_ranks_is_that_of_one_process(tmp_path, cache, capfd):
    def swept(ranks: Ranks, name: str, *, resume: bool = False) -> list[str]:
        flags = ("--threads", "1", "--force", *ODD[:2], *ODD[4:6])
        out = str(tmp_path / name)
        sweep = SweepConfig(out=out, algorithms=("mocan:steps=2",), thresholds=("0.05", "0.1"), flags=flags)
        outcomes = run_sweep(sweep, "smoke", resume=resume, ranks=ranks)
        return [outcome.evaluation.constraints[0].word for outcome in outcomes]

    words = swept(Ranks(), "one")
    capfd.readouterr()
    assert on_ranks(2, lambda ranks: swept(ranks, "two")) == [words, words]
    assert capfd.readouterr().out.count("run 2 of 2: ") == 1
    one, two = tmp_path / "one", tmp_path / "two"
    runs = sorted(folder.name for folder in one.glob("mocan*"))
    assert len(runs) == 2 and {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in runs:
        same(one / name, two / name)
    before = files(two)
    assert on_ranks(2, lambda ranks: swept(ranks, "two", resume=True)) == [words, words]
    assert files(two) == before


def test_numbers_that_are_not_finite_on_one_rank_end_the_work_of_all():
    """Else a sweep would go on with the next run on that rank alone."""

    def fail(ranks: Ranks) -> list[str]:
        def work(own: range, part: Prompts) -> list[str]:
            if ranks.rank == 1:
                raise NonFiniteError("a state is not finite")
            return part.text

        two = Prompts(text=["a", "b"], kind=["", ""], token_ids=[[1], [2]], key_P=torch.arange(2))
        with pytest.raises(NonFiniteError, match="a state is not finite"):
            by_shares(ranks, two, work)
        return ranks.gather("goes on")

    assert on_ranks(2, fail) == [["goes on"] * 2] * 2
