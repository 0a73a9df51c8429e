"""Whole smoke runs whose ranks hold the model in slices, on 1 x 2 and 2 x 2 ranks: those of one process up to
rounding, equal ones bit for bit, also when they were stopped and lost a rank; and what is refused."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.caid  # noqa: F401, imported before the forks
from engine import train
from engine.config import CaidConfig, EvaluateConfig
from engine.errors import Interrupted, LostRank, UserError
from engine.model.tokenizer import load_tokenizer
from engine.ranks import Ranks
from engine.report import panels  # noqa: F401
from engine.rollout.decoding import Rows
from engine.run import plan
from engine.run.contents import read_contents
from engine.stages import sampling
from engine.stages.alike import check_shares, idle_warnings
from engine.stages.evaluate import run_evaluation
from engine.stages.smoke import smoke_folder
from tests.helpers.rank_runs import at_the_second_step, run, same
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import files

# The audit reads texts, of which each rank of a model is asked about some.
CAID = ["caid", "--n-prompts", "5", "--slack-prompts", "3", "--eval-prompts", "3", "--iterations", "1"]
CAID += ["--steps", "3", "--audit", "vowels=tests.helpers.scorers:vowels"]


FULL = ["--tune", "full", "--learning-rate", "1e-5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache):
    """Makes runs when they are asked for first: FOLDER/RANKS/run."""
    load_tokenizer(smoke_folder())
    plan.matmul_rate(torch.float32, torch.device("cpu"))
    home = tmp_path_factory.mktemp("slices")

    def make(size: int) -> Path:
        out = home / str(size) / "run"
        if not out.exists():
            if size == 1:
                run(Ranks(), *CAID, "--out", str(out))
            else:
                flags = [*CAID, "--model-ranks", "2", "--out", str(out)]
                assert on_ranks(size, lambda ranks: run(ranks, *flags)) == [None] * size
        return out

    return make


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_on_slices_is_that_of_one_process(made, size):
    same(made(1), made(size))
    versions = read_contents(made(size)).versions
    assert (versions["ranks"], versions["model ranks"]) == (str(size), "2")


def test_a_run_that_was_stopped_and_lost_a_rank_is_bitwise_the_undisturbed_one(made, tmp_path):
    """Ctrl-C reaches one slice alone in a policy step: both end after it. Then one is killed in the middle of
    decoding, where the other waits for its sums."""
    out = tmp_path / "run"

    def stop(ranks: Ranks) -> None:
        at_the_second_step(lambda: os.kill(os.getpid(), signal.SIGINT))(ranks)
        run(ranks, *CAID, "--model-ranks", "2", "--out", str(out))

    for error in on_ranks(2, stop):
        assert isinstance(error, Interrupted) and str(error) == f"stopped; go on with --resume {out}"

    def kill(ranks: Ranks) -> None:
        fed, feed = [], Rows.feed

        def die(self: Rows, *words) -> None:
            fed.append(1)
            if len(fed) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            feed(self, *words)

        if ranks.rank == 1:  # in the rank's own process
            Rows.feed = die
        run(ranks, "caid", "--resume", str(out), "--model-ranks", "2")

    survivor, gone = on_ranks(2, kill)
    assert isinstance(survivor, LostRank) and isinstance(gone, ChildProcessError), survivor
    resume = ["caid", "--resume", str(out), "--model-ranks", "2"]
    assert on_ranks(2, lambda ranks: run(ranks, *resume)) == [None, None]
    whole, resumed = files(made(2)), files(out)
    assert [name for name in whole.keys() | resumed.keys() if whole.get(name) != resumed.get(name)] == []


def test_slices_that_draw_different_tokens_end_the_run(tmp_path, cache):
    def draw(ranks: Ranks) -> None:
        generate = sampling.generate

        def other(*words, seed: int, **options):
            return generate(*words, seed=seed + 1, **options)

        if ranks.rank == 1:  # in the rank's own process
            sampling.generate = other
        # All answers are of one length, so that the slices take equally many steps.
        run(ranks, *CAID, "--max-new-tokens", "1", "--model-ranks", "2", "--out", str(tmp_path / "run"))

    for error in on_ranks(2, draw):
        assert isinstance(error, UserError), error
        assert str(error).startswith("tokens drawn by the slices of a model: rank 1 has "), error


def test_a_run_is_judged_on_slices(made, tmp_path):
    def judged(ranks: Ranks, name: str, model_ranks: int) -> str:
        flags = EvaluateConfig(threads=1, n_prompts=3, out=str(tmp_path / name), model_ranks=model_ranks)
        return run_evaluation(made(1), flags, ranks)[0].evaluation.constraints[0].word

    word = judged(Ranks(), "one", 1)
    assert on_ranks(2, lambda ranks: judged(ranks, "two", 2)) == [word, word]
    texts = [(tmp_path / name / "heldout.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line)["policy"] for line in lines] for lines in texts)
    assert one == two and len(one) == 6


@pytest.mark.parametrize(
    ("size", "words", "said"),
    [
        (2, ["--model-ranks", "4"], "--model-ranks 4 does not divide the 2 ranks of a machine"),
        (4, ["--model-ranks", "4"], "--model-ranks 4 does not divide the model's 2 key heads"),
        (
            2,
            ["--model-ranks", "2", *FULL],
            "--model-ranks 2: slices are for adapters, and --tune full spreads",
        ),
        (2, ["--model-ranks", "RANKS"], "--model-ranks: rank 1 has 2, rank 0 has 1; start all ranks with"),
    ],
)
def test_what_slices_cannot_do_is_refused_on_all_before_there_is_a_folder(tmp_path, cache, size, words, said):
    out = tmp_path / "refused"

    def refused(ranks: Ranks) -> None:
        own = [str(1 + ranks.rank) if word == "RANKS" else word for word in words]
        run(ranks, *CAID, *own, "--out", str(out))

    # Others may wait for a rank that has read the model before them.
    found = [error for error in on_ranks(size, refused) if not isinstance(error, LostRank)]
    assert found and all(isinstance(error, UserError) and str(error).startswith(said) for error in found), (
        found
    )
    assert not out.exists()


def test_weights_of_one_slice_that_are_not_finite_end_all_ranks_before_there_is_a_folder(tmp_path, cache):
    """The number stands in the last row of the last layer's keys, which rank 1 reads alone."""
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(smoke_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    name = max(key for key in weights if key.endswith("k_proj.weight"))
    weights[name][-1, -1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scorers = ["--reward", "length", "--cost", "vowels=tests.helpers.scorers:vowels", "--audit", "length"]

    def load(ranks: Ranks) -> None:
        flags = ["--model", str(folder), *scorers, "--model-ranks", "2"]
        run(ranks, *CAID[:-2], *flags, "--out", str(out))

    for error in on_ranks(2, load):
        assert isinstance(error, UserError) and f"of tensor {name} are not finite" in str(error), error
    assert not out.exists()


def test_prompts_are_counted_by_models():
    """Six ranks that hold three models have three shares of the prompts."""
    ranks = replace(Ranks(0, 6, 0, 6), model=Ranks(0, 2))
    check_shares(CaidConfig(n_prompts=3), ranks)
    with pytest.raises(UserError, match="^6 ranks share out 2 training prompts.*start at most 4 ranks"):
        check_shares(CaidConfig(n_prompts=2), ranks)
    assert idle_warnings(CaidConfig(prompts_per_step=3), ranks) == []
    (said,) = idle_warnings(CaidConfig(prompts_per_step=2), ranks)
    assert said.startswith("--prompts-per-step 2 keeps 4 of 6 ranks busy in a policy step")


def test_one_process_goes_on_only_without_slices(made, capsys):
    """The flag stands beside --resume RUN, and a run that is done is done with any number of ranks."""
    out = str(made(2))
    assert train.main(["--resume", out, "--model-ranks", "2"]) == 2
    assert "--model-ranks 2: one process holds the whole model; start torchrun" in capsys.readouterr().err
    assert train.main(["--resume", out]) == 0
    assert "resumed with other versions of model ranks, ranks" in capsys.readouterr().out
