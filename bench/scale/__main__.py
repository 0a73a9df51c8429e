"""Predicts a CAID run of the papers' size on many GPUs:
`python -m bench.scale --model 8b --ranks 64 --card h100`.

It prints each stage's time, messages, bytes and memory, and how well the GPUs are used as there are more of
them, with all that is taken for granted; draws that; and counts on two processes of this machine what ranks
send. It ends with exit code 1 where that is more than it should be. This needs no GPU. On a machine with GPUs

    torchrun --nproc-per-node 8 -m bench.scale --model 8b

measures the rates that a prediction needs, and then a shorter run of a model of that size with random
weights: of each part its time, messages, bytes and peak memory on the rank where each is largest, by NCCL,
beside the prediction. That has not been run on GPUs yet; tests run it with processors in their place.
"""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.scale.cards import CARDS, PER_MACHINE, Card, assumptions
from bench.scale.counted import Counted, count_on
from bench.scale.measured import SHORT, measured, random_folder
from bench.scale.parts import Part, run_in_parts
from bench.scale.picture import draw, efficiencies
from bench.scale.predicted import CONFIGS, MODELS, RUN, Prediction, predict, predicted
from engine.command import Standing, run_command
from engine.errors import UserError
from engine.ranks import Ranks
from engine.stages.alike import check_model_ranks

RANKS = (1, 2, 4, 8, 16, 32, 64)


# The stages that pass while an update is measured: it ends with the answers that measure its slack
# (`engine.stages.trust`).
IN_UPDATE = ("policy step", "iterate", "slack")


@dataclass(frozen=True)
class Options:
    """Predict a run on many GPUs, and count what its ranks send."""

    model: Literal["8b", "32b", "70b"] = "8b"
    """Llama 3 8B, Qwen 2.5 32B or Llama 3 70B."""
    tune: Literal["lora", "full"] = "lora"
    """Train an adapter, or all weights."""
    ranks: int = 64
    """GPUs, one rank each."""
    model_ranks: int = 1
    """Neighbouring GPUs that hold one model together, each a slice of it, as in engine.train."""
    card: Literal["a100", "h100", "h200"] = "h100"
    """The GPU."""
    picture: Path = Path("scale.png")
    """Where efficiency against ranks is drawn, for all models that fit."""
    scratch: Path = Path("scale-scratch")
    """Under torchrun, on GPUs: a folder that all ranks see and that is not there yet, for a model of random
    weights and its run; it is deleted at the end."""


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code, 0 where the ranks send no more than they should."""
    options = tyro.cli(Options, args=arguments, prog="python -m bench.scale")
    return run_command(lambda _, standing: _run(options, standing), arguments, on_ranks=True)


def _run(options: Options, standing: Standing) -> int:
    for name, number in (("ranks", options.ranks), ("model-ranks", options.model_ranks)):
        if number < 1:
            raise UserError(f"--{name} {number}: must be at least 1.")
    check_model_ranks(options.tune, options.model_ranks)
    if standing.ranks is not None:
        return _measure(options, standing.ranks)
    if options.ranks % options.model_ranks or options.model_ranks > PER_MACHINE:
        raise UserError(
            f"--model-ranks {options.model_ranks} does not divide --ranks {options.ranks} or the "
            f"{PER_MACHINE} of a machine; use 2, 4 or 8."
        )
    console, card = Console(), CARDS[options.card]
    _print(console, options, card)
    draw(_curves(card), card.name).savefig(options.picture)
    console.print(f"picture: {options.picture}")
    counts = count_on(2, options.tune)
    console.print(counted_table(counts))
    return 1 if any(counted.bytes > counted.most for counted in counts) else 0


def _measure(options: Options, ranks: Ranks) -> int:
    """Measures on the ranks' GPUs, and prints it beside what is predicted with their rates."""
    if not torch.cuda.is_available():
        raise UserError("under torchrun bench.scale measures GPUs, and torch finds none here.")
    device = torch.device("cuda", ranks.local)
    torch.cuda.set_device(device)
    card = measured(CARDS[options.card], ranks, device)
    if ranks.is_first:
        _print(Console(), replace(options, ranks=ranks.size), card)
    parts, found = measured_run(
        options.model, options.tune, card, ranks, device, options.scratch, options.model_ranks
    )
    if ranks.is_first:
        Console().print(measured_table(parts, found))
    return 0


def measured_run(
    model: str,
    tune: str,
    card: Card,
    ranks: Ranks,
    device: torch.device,
    scratch: Path,
    model_ranks: int = 1,
) -> tuple[list[list[Part]], Prediction]:
    """Makes a short run of a model with random weights; all ranks call it. Returns the parts of each rank,
    and what is predicted of the same run."""
    if ranks.first(scratch.exists):
        raise UserError(f"--scratch {scratch} exists; choose another one.")
    try:
        ranks.first(lambda: random_folder(CONFIGS[model], scratch / "model", device))
        config = replace(
            RUN,
            **SHORT,
            tune=tune,
            model_ranks=model_ranks,
            model=str(scratch / "model"),
            out=str(scratch / "run"),
            device=device.type,
        )
        parts, stages = run_in_parts(config, ranks)
        every = ranks.gather(parts)
    finally:
        if ranks.is_first:
            shutil.rmtree(scratch, ignore_errors=True)
    return every, predicted(MODELS[model], config, card, ranks.size)


def _print(console: Console, options: Options, card: Card) -> None:
    console.print(
        f"A PREDICTION, not a measurement: CAID with --tune {options.tune} on {options.model}, "
        f"{RUN.n_prompts} prompts x {RUN.n_responses} responses x {RUN.max_new_tokens} tokens, "
        f"{RUN.iterations} iterations of {RUN.steps} steps of {RUN.prompts_per_step} prompts. It takes for "
        "granted:"
    )
    for line in assumptions(card):
        console.print(f"- {line}")
    asked = options.model, options.tune, card
    found = predict(*asked, options.ranks, options.model_ranks)
    if not found.fits:
        raise UserError(
            f"{options.model} on {options.ranks} ranks needs {found.needed_bytes / 1e9:.1f} GB on each and "
            f"{card.free_bytes / 1e9:.0f} GB are free; {found.cure}."
        )
    console.print(stages_table(found))
    many = [ranks for ranks in RANKS if ranks <= options.ranks and ranks % options.model_ranks == 0]
    console.print(ranks_table([predict(*asked, ranks, options.model_ranks) for ranks in many]))


def stages_table(found: Prediction) -> Table:
    """Returns the table of a run's stages."""
    flags = f", {found.spared}" if found.spared else ""
    title = f"predicted for each of {found.ranks} ranks: {found.needed_bytes / 1e9:.1f} GB{flags}"
    table = Table("stage", "times", "computes, s", "sends, MB", "messages", "sending, s", title=title)
    for stage in found.stages:
        table.add_row(
            stage.name,
            f"{stage.times}",
            f"{stage.compute_s:.3f}",
            f"{stage.sent_bytes / 1e6:.1f}",
            f"{stage.messages}",
            f"{stage.message_s:.4f}",
        )
    return table


def ranks_table(curve: list[Prediction]) -> Table:
    """Returns the table of a run on more and more ranks."""
    table = Table(
        "ranks", "GB each", "shards", "rows", "min", "efficiency", "flags", title="predicted by ranks"
    )
    shares = iter(efficiencies([point for point in curve if point.fits]))
    for point in curve:
        row = [f"{point.ranks}", f"{point.needed_bytes / 1e9:.1f}", f"{point.shards}", f"{point.rows}"]
        if point.fits:
            row += [f"{point.seconds / 60:.1f}", f"{100 * next(shares):.0f} %", point.spared]
        else:
            row += ["does not fit", "", ""]
        table.add_row(*row)
    return table


def measured_table(every: list[list[Part]], found: Prediction) -> Table:
    """Returns the table of a run that was measured, beside what was predicted of it. every: of each rank."""
    title = f"MEASURED on {len(every)} ranks; predicted: {found.needed_bytes / 1e9:.1f} GB at the peak"
    table = Table("part", "s", "predicted, s", "messages", "MB", "peak GB", title=title)
    predicted_s: dict[str, float] = {}
    for stage in found.stages:
        part = "update" if stage.name in IN_UPDATE else stage.name
        predicted_s[part] = predicted_s.get(part, 0.0) + stage.seconds
    for same in zip(*every, strict=True):
        table.add_row(
            same[0].name,
            f"{max(part.seconds for part in same):.3f}",
            f"{predicted_s.get(same[0].name, 0.0):.3f}",
            f"{max(len(part.messages) for part in same)}",
            f"{max(part.bytes for part in same) / 1e6:.1f}",
            f"{max(part.peak_bytes for part in same) / 1e9:.1f}",
        )
    return table


def counted_table(counts: list[Counted]) -> Table:
    """Returns the table of what ranks have sent."""
    title = "counted on 2 ranks of a tiny model, by gloo on this machine"
    table = Table("part", "messages", "bytes", "least", "may be", title=title)
    for counted in counts:
        table.add_row(
            counted.name,
            f"{len(counted.messages)}",
            f"{counted.bytes}",
            f"{counted.least}",
            f"{counted.most}{'' if counted.bytes <= counted.most else ', and is more'}",
        )
    return table


def _curves(card: Card) -> dict[str, list[Prediction]]:
    """Returns predictions on more and more ranks, of all models on those that they fit."""
    curves = {}
    for model in MODELS:
        for tune in ("lora", "full"):
            points = [predict(model, tune, card, ranks) for ranks in RANKS]
            if fitting := [point for point in points if point.fits]:
                curves[f"{model} {tune}"] = fitting
    return curves


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
