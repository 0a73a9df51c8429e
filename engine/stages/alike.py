"""What the ranks of a run must have in common, and what is refused or warned of where there are several."""

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch

from engine.config import RunConfig
from engine.errors import UserError
from engine.ranks import Ranks
from engine.records import Prompts
from engine.stages.inputs import Inputs


def check_ranks(algorithm: str, config: RunConfig, resume: str | None, ranks: Ranks) -> None:
    """Checks that several ranks were started with the same settings, for a run that they can do.

    Raises: UserError.
    """
    if ranks.size == 1:
        return
    settings = {f"--{f.name.replace('_', '-')}": str(getattr(config, f.name)) for f in fields(config)}
    ranks.check_alike(settings | {"algorithm": algorithm, "--resume": str(resume)})
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


def check_shares(config: RunConfig, ranks: Ranks) -> None:
    """Checks that there are prompts for all ranks. Raises: UserError."""
    if ranks.shares > config.n_prompts:
        most = config.n_prompts * ranks.model_size
        raise UserError(
            f"{ranks.size} ranks share out {config.n_prompts} training prompts, so some would never work: "
            f"start at most {most} ranks, or give more prompts."
        )


def check_same_inputs(
    ranks: Ranks, inputs: Inputs, scorers: Mapping[str, Mapping[str, str]], prompts: Sequence[Prompts]
) -> None:
    """Checks that all ranks have read the same model, prompts and scorers, and compute on equal devices with
    equal versions; scorers: as `engine.scorers.find.content` gives them. Raises: UserError."""
    if ranks.size == 1:
        return
    kind = torch.cuda.get_device_name(inputs.device) if inputs.device.type == "cuda" else "cpu"
    read = "\n".join(text for some in prompts for text in (*some.text, *map(str, some.key_P.tolist())))
    facts = {"device": kind, "model": inputs.fingerprint, "prompts": _hash(read)}
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
    """Lists what the numbers of a run depend on: commit, packages, threads, and where there are several, the
    ranks and how many hold one model together."""
    root = Path(__file__).resolve().parents[2]
    commit = ""
    if (root / ".git").exists():
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True
        ).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    several = {} if ranks.size == 1 else {"ranks": str(ranks.size)}
    if ranks.model is not None:
        several["model ranks"] = str(ranks.model_size)
    return {"commit": commit or "unknown", "threads": str(torch.get_num_threads()), **packages, **several}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
