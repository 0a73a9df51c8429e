"""What the ranks of a run must have in common, and what is refused or warned of where there are several."""

import hashlib
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch

from engine.config import RunConfig
from engine.errors import UserError
from engine.files import sha256_of_file
from engine.ranks import Ranks
from engine.records import Prompts
from engine.run.folder import RunFolder
from engine.run.run import Run
from engine.stages.inputs import Inputs

# So long may a disk that machines share take to show on all of them what rank 0 has written.
SEEN_S = 10.0


def check_ranks(algorithm: str, config: RunConfig, resume: str | None, ranks: Ranks) -> None:
    """Checks that several ranks were started with the same program and settings, for a run that they can do.

    Raises: UserError.
    """
    if ranks.size == 1:
        return
    settings = {f"--{f.name.replace('_', '-')}": str(getattr(config, f.name)) for f in fields(config)}
    ranks.check_alike(program() | settings | {"algorithm": algorithm, "--resume": str(resume)})
    check_model_ranks(config.tune, config.model_ranks)
    if config.tune == "full" and config.dtype == "float16":
        raise UserError(
            f"--dtype float16: with --tune full on {ranks.size} ranks it has not been tried; use bfloat16 or "
            "float32."
        )


def check_model_ranks(tune: str, model_ranks: int) -> None:
    """Checks that a run's model can be held in slices. Raises: UserError."""
    if tune == "full" and model_ranks > 1:
        raise UserError(
            f"--model-ranks {model_ranks}: slices are for adapters, and --tune full spreads the weights over "
            "all ranks by itself; leave it out."
        )


def check_shares(config: RunConfig, ranks: Ranks, *, resumes: bool = False) -> None:
    """Checks that there are prompts for all ranks; resumes: no others can be given. Raises: UserError."""
    if ranks.shares > config.n_prompts:
        most = config.n_prompts * ranks.model_size
        raise UserError(
            f"{ranks.size} ranks share out {config.n_prompts} training prompts, so some would never work: "
            f"start at most {most} ranks{'' if resumes else ', or give more prompts'}."
        )


def check_seen(ranks: Ranks, run: Path) -> None:
    """Checks that every rank sees the run folder that rank 0 has. All call it. Raises: UserError."""
    if ranks.size == 1:
        return
    file = RunFolder(run).config

    def digest() -> str:
        return sha256_of_file(file) if file.is_file() else ""

    def see() -> None:
        deadline = time.monotonic() + SEEN_S
        while (found := digest()) != there and time.monotonic() < deadline:
            time.sleep(0.1)
        if found != there:
            sees = "sees another one" if found else "does not see it"
            raise UserError(
                f"run folder {run}: rank {ranks.rank} {sees} at {run.absolute()}; name one that all machines "
                "share, and start them in one working folder."
            )

    # Where rank 0 sees none itself, what reads the folder says so.
    if there := ranks.first(digest):
        ranks.agreed(see)


def check_new(run: Run) -> None:
    """Checks that every rank sees the run folder that rank 0 has just made, which goes again where one does
    not. Raises: UserError."""
    try:
        check_seen(run.ranks, run.folder)
    except UserError:
        if run.ranks.is_first:
            shutil.rmtree(run.folder)
        raise


def check_same_inputs(
    ranks: Ranks, inputs: Inputs, scorers: Mapping[str, Mapping[str, str]], prompts: Sequence[Prompts]
) -> None:
    """Checks that all ranks have read the same model, prompts and scorers, and compute on equal devices with
    equal versions; scorers: as `engine.scorers.find.content` gives them. Raises: UserError."""
    if ranks.size == 1:
        return
    kind = torch.cuda.get_device_name(inputs.device) if inputs.device.type == "cuda" else "cpu"
    read = [row for some in prompts for row in zip(some.text, some.key_P.tolist(), strict=True)]
    facts = {"device": kind, "--dtype": str(inputs.dtype), "model": inputs.fingerprint}
    facts |= {f"{name} of the model": digest for name, digest in inputs.files.items()}
    facts |= {"prompts": _hash(f"{read}")}
    facts |= {f"scorer {name}": content["sha256"] for name, content in scorers.items()}
    ranks.check_alike(facts | versions(ranks))


def idle_warnings(config: RunConfig, ranks: Ranks) -> list[str]:
    """Warns of policy steps that keep some ranks waiting."""
    if config.prompts_per_step >= ranks.shares:
        return []
    busy = config.prompts_per_step * ranks.model_size
    return [
        f"--prompts-per-step {config.prompts_per_step} keeps {busy} of {ranks.size} ranks busy in a policy "
        "step; raise it, or start fewer ranks"
    ]


def versions(ranks: Ranks) -> dict[str, str]:
    """Lists what the numbers of a run depend on: the program, threads, and where there are several, the ranks
    and how many hold one model together."""
    several = {} if ranks.size == 1 else {"ranks": str(ranks.size)}
    if ranks.model is not None:
        several["model ranks"] = str(ranks.model_size)
    return program() | {"threads": str(torch.get_num_threads())} | several


def program() -> dict[str, str]:
    """Lists the commit of this program, and the versions of the packages that its numbers depend on."""
    root = Path(__file__).resolve().parents[2]
    commit = ""
    if (root / ".git").exists():
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True
        ).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {"commit": commit or "unknown", **packages}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
