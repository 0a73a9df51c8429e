"""Measures on a real machine, under torchrun, what `bench.scale.cards` takes for granted of a GPU, and writes
the model of a run to be measured. It has not been run on GPUs yet; tests run it with processors in their
place."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from bench.run import floors
from bench.run.measure import interleaved
from bench.run.shapes import random_model
from bench.scale.cards import Card
from engine.model.folder import save
from engine.ranks import Ranks
from engine.stages.smoke import smoke_folder, write_random_heads

REPEATS = 7
# Of a run that is measured, the rest as in `bench.scale.predicted`. Random weights answer at random, so no
# threshold is refused and no iterate taken back.
SHORT: dict[str, Any] = {
    "n_prompts": 512,
    "slack_prompts": 128,
    "eval_prompts": 128,
    "iterations": 1,
    "steps": 4,
    "force": True,
    "max_kl_ratio": math.inf,
}


def random_folder(config: dict, folder: Path, device: torch.device) -> None:
    """Writes a model with random weights and score heads. config: the contents of config.json."""
    # Token ids are drawn, so any tokenizer will do.
    save(random_model(config, torch.bfloat16, device), folder, tokenizer_from=smoke_folder())
    write_random_heads(folder)


def measured(card: Card, ranks: Ranks, device: torch.device, message_bytes: int = 2**28) -> Card:
    """Returns the card with the rates that the ranks reach together, those of the slowest; all ranks call it.

    message_bytes: of a large message. Ranks of one machine measure the wires within it, those of several the
    wires between them.
    """
    probes = floors.probes(torch.bfloat16, device)
    steps = {name: probe.step for name, probe in probes.items()}
    rates = floors.rates(probes, interleaved(steps, REPEATS, device))
    large = torch.zeros(message_bytes // 4, device=device)
    small = torch.zeros(1, device=device)
    host = torch.zeros(message_bytes // 16, dtype=torch.uint8)
    sent = 2 * message_bytes * (ranks.size - 1) / ranks.size
    free = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else card.free_bytes
    own = {
        "free_bytes": free,
        "flops_per_s": rates.flops_per_s,
        "bytes_per_s": rates.bytes_per_s,
        "wire": sent / _seconds(lambda: dist.all_reduce(large), device),
        "host_bytes_per_s": len(host) * (ranks.size - 1) / _seconds(lambda: ranks.gather(host), device),
        "waits": 1 / _seconds(lambda: dist.all_reduce(small), device),
    }
    slowest = {name: min(every[name] for every in ranks.gather(own)) for name in own}
    wire, waits = slowest.pop("wire"), slowest.pop("waits")
    one_machine = ranks.size == ranks.local_size
    wires = {"local_bytes_per_s" if one_machine else "remote_bytes_per_s": wire}
    return replace(card, name=f"{card.name}, measured", message_s=1 / waits, **wires, **slowest)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of a step that all ranks take together."""
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return median(times[1:])
