"""What is said of ranks that a run cannot use, before it begins."""

import json
import os
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import engine.caid  # noqa: F401, imported before the forks
from engine.command import Standing, join_ranks, run_command
from engine.config import CaidConfig, smoke
from engine.errors import LostRank, UserError
from engine.ranks import Ranks
from engine.stages import alike, inputs
from engine.stages.alike import check_seen, check_shares, idle_warnings
from engine.stages.inputs import read_inputs
from engine.stages.job import open_job
from engine.stages.smoke import smoke_folder
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import write

CONFIG = replace(smoke(CaidConfig()), threads=1)


@pytest.mark.parametrize(
    ("prompts", "ranks", "busy"), [(16, 64, 16), (4, 5, 4), (64, 64, None), (8, 1, None)]
)
def test_a_step_of_fewer_prompts_than_ranks_is_said(prompts, ranks, busy):
    said = idle_warnings(replace(CaidConfig(), prompts_per_step=prompts), Ranks(0, ranks))
    line = f"--prompts-per-step {prompts} keeps {busy} of {ranks} ranks busy in a policy step; raise it, or "
    assert said == ([] if busy is None else [f"{line}start fewer ranks"])


def test_more_ranks_than_prompts_are_refused():
    config = replace(CaidConfig(), n_prompts=8)
    check_shares(config, Ranks(0, 8))
    with pytest.raises(
        UserError, match="^9 ranks share out 8 training prompts, .* start at most 8 ranks, or"
    ):
        check_shares(config, Ranks(0, 9))
    with pytest.raises(UserError, match="start at most 8 ranks.$"):
        check_shares(config, Ranks(0, 9), resumes=True)


def test_one_rank_under_torchrun_is_a_process_without_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "1")
    standing = Standing()
    join_ranks(standing, False, ["run", "folder"])
    assert standing.ranks is None and not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted: start the command again\n"), ("1", "")])
def test_one_rank_says_that_all_were_stopped_before_they_had_joined(monkeypatch, capsys, rank, said):
    def stopped() -> Ranks:
        raise KeyboardInterrupt

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(Ranks, "start", stopped)
    assert run_command(lambda words, standing: None, [], on_ranks=True) == 130
    assert capsys.readouterr().err == said


def test_other_words_of_a_command_are_refused_before_anything_is_told(monkeypatch):
    """Where one machine sees the run and goes on, and another one does not and begins."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")

    def join(ranks: Ranks) -> bool:
        Ranks.start = lambda: ranks  # in the rank's own process
        words, standing = ["--resume", "a"] if ranks.is_first else ["caid", "--out", "a"], Standing()
        try:
            join_ranks(standing, True, words)
        finally:
            assert standing.ranks is ranks, "one of them has to say it"

    for error in on_ranks(2, join):
        assert isinstance(error, UserError) and str(error).startswith(
            "word 1 of the command line: rank 1 has caid, rank 0 has --resume; start all ranks with the same"
        )


def opened(ranks: Ranks, config: CaidConfig) -> str:
    """Begins a run in this process's working folder; returns what is said against it."""
    try:
        with open_job("caid", replace(config, out="run"), None, ranks=ranks):
            return ""
    except UserError as error:
        return str(error)


def test_a_run_folder_that_a_rank_does_not_see_is_refused(tmp_path):
    """Each rank has a working folder of its own, as on machines that share none."""

    def work(ranks: Ranks) -> list:
        alike.SEEN_S = 0.2  # in the rank's own process
        here = tmp_path / f"{ranks.rank}"
        (here / "old").mkdir(parents=True)
        os.chdir(here)
        # None at all, the same one, and another one of its name.
        said = [check_seen(ranks, Path("old"))]
        for text in ({"rank": 0}, {"rank": ranks.rank}):
            Path("old/config.json").write_text(json.dumps(text))
            try:
                said.append(check_seen(ranks, Path("old")))
            except UserError as error:
                said.append(str(error))
        return said

    for none, same, other in on_ranks(2, work):
        assert none is None and same is None
        assert other.startswith(f"run folder old: rank 1 sees another one at {tmp_path / '1' / 'old'}; name")


def test_a_rank_with_another_program_or_model_is_named(tmp_path, cache):
    """At last nothing is amiss but that the ranks do not work in one folder. A template that writes the time
    is told that of rank 0 on both, or their tokens would differ."""
    for rank in range(2):
        shutil.copytree(smoke_folder(), tmp_path / f"{rank}" / "model")
    other = tmp_path / "1" / "model"
    template = tmp_path / "clock.jinja"
    template.write_text("{{ strftime_now('%H:%M:%S') }}{% for m in messages %} {{ m.content }}{% endfor %}")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Say {i}."} for i in range(60)])
    # The audit's head is one for the model that rank 0 has.
    scorers = {"reward": "length", "cost": ("length",)}
    config = replace(CONFIG, model="model", template=str(template), prompts=prompts, **scorers)

    def work(ranks: Ranks) -> list:
        def told(where: Path, key: str, value: object) -> str:
            """Begins where rank 1 has something else in a file of JSON."""
            kept = where.read_text() if where.exists() else None
            if ranks.rank == 1:
                where.write_text(json.dumps(json.loads(kept or "{}") | {key: value}))
            said = opened(ranks, config)
            ranks.gather(None)
            if ranks.rank == 1:
                where.write_text(kept) if kept else where.unlink()
            return said

        os.chdir(tmp_path / f"{ranks.rank}")  # in the rank's own process
        now, version, alike.SEEN_S = inputs.clock(), alike.version, 0.2
        inputs.clock = lambda: now + timedelta(minutes=7 * ranks.rank)
        alike.version = lambda name: "9.9" if name == "numpy" and ranks.rank else version(name)
        said = [opened(ranks, config)]
        alike.version = version
        automatic, inputs._automatic = inputs._automatic, lambda *words: ("float32", "bfloat16")[ranks.rank]
        said.append(opened(ranks, config))
        inputs._automatic = automatic
        said.append(told(other / "config.json", "rms_norm_eps", 0.5))
        said.append(told(other / "generation_config.json", "eos_token_id", 5))
        said.append(opened(ranks, config))
        assert not Path("run").exists()
        return said

    first, second = on_ranks(2, work)
    assert first == second
    version, dtype, model, stops, unseen = first
    assert version.startswith("numpy: rank 1 has 9.9, rank 0 has ")
    assert dtype.startswith(
        "--dtype: rank 1 has torch.bfloat16, rank 0 has torch.float32; start all ranks with"
    )
    assert model.startswith("model: rank 1 has ")
    assert stops.startswith("generation_config.json of the model: rank 1 has ")
    assert unseen == (
        f"run folder run: rank 1 does not see it at {tmp_path / '1' / 'run'}; name one that all machines "
        "share, and start them in one working folder."
    )


def test_fewer_gpus_than_ranks_of_a_machine_are_refused_by_one_rank_of_it():
    config = replace(smoke(CaidConfig()), device="cuda")

    def read(ranks: Ranks) -> None:
        torch.cuda.is_available, torch.cuda.device_count = (
            lambda: True,
            lambda: 1,
        )  # in the rank's own process
        with ranks.node_first():
            read_inputs(config, ranks=ranks)

    first, other = on_ranks(2, read)
    assert isinstance(first, UserError) and isinstance(other, LostRank)
    assert str(first) == (
        "2 ranks on a machine with 1 visible CUDA devices: start --nproc-per-node 1, or use --device cpu."
    )
