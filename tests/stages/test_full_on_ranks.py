"""Whole smoke runs with --tune full on several ranks: those of one process up to rounding, equal ones bit for
bit, also when they are stopped or a rank is killed; evaluations and exports of what ranks have made."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # noqa: F401, imported before the forks
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import engine.baselines.sacpo
import engine.caid  # noqa: F401
from engine import export, train
from engine.config import EvaluateConfig
from engine.errors import Interrupted, LostRank, NonFiniteError
from engine.model.parallel import load_spread
from engine.model.tokenizer import load_tokenizer
from engine.policy import update
from engine.ranks import Ranks
from engine.records import Prompts
from engine.report import panels  # noqa: F401
from engine.run import plan, shards
from engine.run.store import read_whole
from engine.stages import refusals
from engine.stages.evaluate import run_evaluation
from engine.stages.smoke import smoke_folder
from tests.helpers.rank_runs import ODD, at_the_second_step, few_prompts, run, same
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import files

# At 1e-3 one loss parts by 1.1e-5: AdamW turns a gradient near 0 into its sign, so that some weights part by
# the length of a step.
FULL = ["--tune", "full", "--learning-rate", "1e-4", "--checkpoint-every", "2"]
RUNS = {
    "caid": ["caid", *ODD, *FULL],
    # On 4 ranks some have no prompt in a stage, and none in some steps.
    "few": ["caid", "--slack-prompts", "3", "--eval-prompts", "3", "--iterations", "1", *FULL],
    # It goes on from an iterate, which is its anchor too.
    "sacpo": ["sacpo", "--steps", "2", *ODD[:2], *ODD[4:6], *FULL],
}


class Runs:
    """Makes runs when they are asked for first: FOLDER/RANKS-MACHINES/NAME/run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.few_prompts = folder, few_prompts(folder)

    def __call__(self, size: int, name: str, machines: int = 1) -> Path:
        out = self.folder / f"{size}-{machines}" / name / "run"
        flags = [*self.flags(name), "--out", str(out)]

        def work(ranks: Ranks) -> None:
            local = size // machines
            run(replace(ranks, local=ranks.rank % local, local_size=local), *flags)

        if not out.exists():
            if size == 1:
                run(Ranks(), *flags)
            else:
                assert on_ranks(size, work) == [None] * size
        return out

    def flags(self, name: str) -> list[str]:
        """Returns the algorithm and the flags of a run."""
        return [*RUNS[name], *self.few_prompts]


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache) -> Runs:
    load_tokenizer(smoke_folder())
    plan.matmul_rate(torch.float32, torch.device("cpu"))
    return Runs(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def stopped(made) -> Path:
    """Leaves a run of two ranks that Ctrl-C has stopped, which reached one of them alone: both end after the
    next step, which is saved."""
    out = made.folder / "stopped" / "run"

    def stop(ranks: Ranks) -> None:
        at_the_second_step(lambda: os.kill(os.getpid(), signal.SIGINT))(ranks)
        run(ranks, *made.flags("caid"), "--out", str(out))

    for error in on_ranks(2, stop):
        assert isinstance(error, Interrupted) and str(error) == f"stopped; go on with --resume {out}"
    (partial,) = out.glob("stages/*.partial.safetensors")
    assert len(read_whole(partial)[1]["record"]["fields"]["losses"]) == 3
    return out


def rows_of_a_shard(folder: Path) -> int:
    """Returns the most rows of the embedding that a file of the first iterate holds."""
    (record,) = folder.glob("stages/*-iteration-1-policy.safetensors")
    files_of_it = [record, *folder.glob("stages/*-iteration-1-policy.*.shards/*")]
    name, rows = "adapter.masters.embed", []
    for file in files_of_it:
        with safe_open(file, framework="pt") as opened:
            rows += [opened.get_slice(name).get_shape()[0]] if name in opened.keys() else []  # noqa: SIM118
    return max(rows)


@pytest.mark.parametrize(("size", "name", "machines"), [(2, "caid", 1), (4, "few", 2), (2, "sacpo", 1)])
def test_a_run_on_ranks_is_that_of_one_process(made, size, name, machines):
    """Each of two machines keeps a copy of the weights."""
    one, many = made(1, name), made(size, name, machines)
    same(one, many)
    assert rows_of_a_shard(many) == -(-rows_of_a_shard(one) * machines // size)
    iterates = sorted(path.name for path in (one / "adapters").iterdir())
    assert iterates
    for iterate in iterates:
        expected, found = (load_file(r / "adapters" / iterate / "model.safetensors") for r in (one, many))
        assert expected.keys() == found.keys()
        for weight in expected:
            assert (found[weight] - expected[weight]).norm() <= 1e-5 * expected[weight].norm(), weight


def test_equal_runs_are_bitwise_equal_also_when_one_was_stopped_and_one_lost_a_rank(made, stopped, tmp_path):
    killed, again = tmp_path / "killed" / "run", shutil.copytree(stopped, tmp_path / "stopped" / "run")

    def kill(ranks: Ranks) -> None:
        """Kills rank 1 between the two halves of its fourth pass, while rank 0 waits for its gradients."""
        passes, add_gradient = [], update.add_gradient

        def die(loss: Tensor, share: float) -> float:
            passes.append(share)
            if len(passes) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return add_gradient(loss, share)

        if ranks.rank == 1:  # in the rank's own process
            update.add_gradient = die
        run(ranks, *made.flags("caid"), "--out", str(killed))

    survivor, gone = on_ranks(2, kill)
    assert isinstance(survivor, LostRank) and isinstance(gone, ChildProcessError), survivor

    def go_on(ranks: Ranks) -> None:
        for folder in (again, killed):
            run(ranks, "caid", "--resume", str(folder))

    assert on_ranks(2, go_on) == [None, None]
    whole = files(made(2, "caid"))
    assert sum(".shards/" in name for name in whole) == 4, "two iterates on two ranks"
    for folder in (again, killed):
        found = files(folder)
        assert [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)] == []


def test_one_process_goes_on_with_shards_of_ranks(made, stopped, tmp_path, capsys):
    out = shutil.copytree(stopped, tmp_path / "run")
    assert train.main(["--resume", str(out)]) == 0
    assert "resumed with other versions of ranks" in capsys.readouterr().out
    same(made(1, "caid"), out)
    assert not list(out.glob("stages/*.shards"))


def test_what_ranks_have_made_is_judged_and_exported(made, tmp_path):
    """By one process, and judged by two ranks."""
    folder = made(2, "caid")

    def judged(ranks: Ranks, name: str) -> str:
        flags = EvaluateConfig(threads=1, n_prompts=3, out=str(tmp_path / name))
        return run_evaluation(folder, flags, ranks)[0].evaluation.constraints[0].word

    word = judged(Ranks(), "one")

    def judged_by_two(ranks: Ranks) -> tuple[str, int]:
        hashed, digest = [], shards.sha256_of_file
        # In the rank's own process.
        shards.sha256_of_file = lambda file: hashed.append(file) or digest(file)
        return judged(ranks, "two"), len(hashed)

    # Each rank looks at one of the two shards; rank 0 once more at both, for the certificate.
    assert on_ranks(2, judged_by_two) == [(word, 3), (word, 1)]
    texts = [(tmp_path / name / "heldout.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line)["policy"] for line in lines] for lines in texts)
    assert one == two
    policies = [
        json.loads((path / "certificate.json").read_text())["digests"]["policy"]
        for path in (folder, tmp_path / "one", tmp_path / "two")
    ]
    assert len(set(policies)) == 1 and len(policies[0]) == 64
    assert export.main([str(folder), str(tmp_path / "merged"), "--even-if"]) == 0
    exported, iterate = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "merged", folder / "adapters" / "iteration-2")
    )
    assert exported.keys() == iterate.keys()
    assert all(torch.equal(exported[name], iterate[name]) for name in iterate)


@pytest.mark.parametrize("told_by_scorer", [False, True])
def test_answers_that_are_not_finite_on_one_rank_leave_the_ranks_together(cache, told_by_scorer):
    """The other rank gathers the reference where a scorer tells refusals, and not where first words do."""
    prompts = Prompts(text=["a", "b"], kind=["", ""], token_ids=[[5], [6]], key_P=torch.arange(2))

    def work(ranks: Ranks) -> list:
        def respond(*words, **options):
            if ranks.rank == 1:
                raise NonFiniteError("an infinite number")
            return None, ["I cannot help with that."]

        # In the rank's own process.
        refusals.respond = respond
        refusals.teller_of_refusals = lambda scorers: told_by_scorer or None
        refusals.score = lambda *words: SimpleNamespace(reward_PG=torch.ones(1, 1))
        network = load_spread(smoke_folder(), dtype=torch.float32, device=torch.device("cpu"), ranks=ranks)
        settings = SimpleNamespace(temperature=1.0)
        subject = SimpleNamespace(model=network, scorers=None, settings=settings, ranks=ranks)
        with pytest.raises(NonFiniteError, match="an infinite number"):
            refusals.sampled_refusals(subject, None, prompts, None, n=1, purpose=0)
        return ranks.gather(ranks.rank)

    assert on_ranks(2, work) == [[0, 1], [0, 1]]
