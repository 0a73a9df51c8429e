"""The commands under torchrun itself, with two processes on one machine."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import on_ranks
from tests.helpers.runs import SMOKE, files

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]


def launched(*words: str) -> subprocess.CompletedProcess:
    """Runs a command on two ranks."""
    return subprocess.run([*LAUNCH, *words], capture_output=True, text=True, timeout=600)


def test_a_run_is_that_of_ranks_which_have_joined_otherwise(tmp_path, cache):
    from engine import caid, train

    flags = [*SMOKE, "--iterations", "1", "--steps", "2"]
    done = launched("engine.train", "caid", *flags, "--out", str(tmp_path / "a" / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 1 of ") == 1, "rank 0 alone speaks"
    config = train.parse("caid", [*flags, "--out", str(tmp_path / "b" / "run")])
    assert on_ranks(2, lambda ranks: caid.train(config, ranks=ranks) and None) == [None, None]
    one, other = files(tmp_path / "a" / "run"), files(tmp_path / "b" / "run")
    assert one.keys() == other.keys()
    # Tests draw reports without their pixels.
    kept = [name for name in one if not Path(name).name.startswith(("report.", "outputs."))]
    assert len(kept) > 15 and [name for name in kept if one[name] != other[name]] == []


def test_a_command_for_one_process_says_so_once():
    done = launched("engine.export", "run", "folder")
    assert done.returncode != 0 and not done.stdout
    said = [line for line in done.stderr.splitlines() if "error: torchrun" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "error: torchrun has started 2 processes, and this command is for one; start it without torchrun."
    )
