"""The commands under torchrun itself, with two processes on one machine."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import on_ranks
from tests.helpers.runs import SMOKE, files

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]


# A scorer with which rank 1 ends a run, once: in the first slack, by a signal to itself or to torchrun.
ENDS = """
import os, signal
from pathlib import Path

def score(prompts, responses):
    mark = Path(os.environ.get("MARK", "/nowhere/mark"))
    begun = mark.parent.is_dir() and list(mark.parent.glob("**/*iteration-1-policy.safetensors"))
    if begun and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        if os.environ["END"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGTERM)
    return [len(r) for r in responses]
"""
FLAGS = [*SMOKE, "--iterations", "1", "--steps", "2", "--audit", "ends=ends:score"]


def launched(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs a command on two ranks."""
    return called([*LAUNCH, *words], env=env)


def called(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    env = os.environ | (env or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Path:
    """Makes the folder of the scorer's module."""
    folder = tmp_path_factory.mktemp("scorer")
    (folder / "ends.py").write_text(ENDS)
    return folder


@pytest.fixture(scope="module")
def expected(scorer, tmp_path_factory, cache) -> dict[str, bytes]:
    """Makes the run that nothing ends, on ranks that have joined without torchrun."""
    from engine import caid, train

    out = tmp_path_factory.mktemp("whole") / "run"

    def run(ranks) -> None:
        sys.path.insert(0, str(scorer))  # in the rank's own process
        caid.train(train.parse("caid", [*FLAGS, "--out", str(out)]), ranks=ranks)

    assert on_ranks(2, run) == [None, None]
    return files(out)


def same(run: Path, expected: dict[str, bytes]) -> None:
    """Compares a run file by file; tests draw reports without their pixels."""
    found = files(run)
    assert found.keys() == expected.keys()
    kept = [name for name in found if not Path(name).name.startswith(("report.", "outputs."))]
    assert len(kept) > 15 and [name for name in kept if found[name] != expected[name]] == []


def test_a_run_is_that_of_ranks_which_have_joined_otherwise(scorer, expected, tmp_path):
    run = tmp_path / "run"
    done = launched("engine.train", "caid", *FLAGS, "--out", str(run), env={"PYTHONPATH": str(scorer)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 1 of ") == 1, "rank 0 alone speaks"
    same(run, expected)


def test_torchrun_starts_the_ranks_anew_and_they_go_on(scorer, expected, tmp_path):
    """Rank 1 is killed in the first slack. What the first ranks have told one another must not stand in the
    way of the next ones."""
    run = tmp_path / "run"
    env = {"PYTHONPATH": str(scorer), "MARK": str(tmp_path / "mark"), "END": "killed"}
    command = [*LAUNCH[:-1], "--max-restarts", "1", "-m", "engine.train", "caid", *FLAGS, "--out", str(run)]
    done = called(command, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists() and "iteration-1/policy (loaded)" in done.stdout
    same(run, expected)


def test_a_preempted_job_goes_on_by_the_same_command(scorer, expected, tmp_path):
    """docs/slurm.sh, with programs that stand for Slurm's on one machine; torchrun gets SIGTERM."""
    programs = {
        "scontrol": "echo 127.0.0.1",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    job = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "n", "NNODES": "1", "NODEID": "0", "GPUS_ON_NODE": "2"}
    env = {f"SLURM_{name}": value for name, value in job.items()}
    env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(scorer)}
    env |= {"MARK": str(tmp_path / "mark"), "END": "stopped", "RUN": str(tmp_path / "run")}
    script = str(Path(__file__).parents[2] / "docs" / "slurm.sh")
    stopped = called(["bash", script, "caid", *FLAGS], env=env)
    assert stopped.returncode != 0 and "stopped; go on with --resume" in stopped.stderr
    assert not (tmp_path / "run" / "evaluation.json").exists()
    done = called(["bash", script, "caid", *FLAGS], env=env)
    assert done.returncode == 0, done.stderr
    assert "iteration-1/policy (loaded)" in done.stdout
    same(tmp_path / "run", expected)


def test_a_command_for_one_process_says_so_once():
    done = launched("engine.export", "run", "folder")
    assert done.returncode != 0 and not done.stdout
    said = [line for line in done.stderr.splitlines() if "error: torchrun" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "error: torchrun has started 2 processes, and this command is for one; start it without torchrun."
    )
