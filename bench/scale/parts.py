"""A CAID run whose parts say what this rank has sent and received, how long they took, and how much of a
GPU's memory they filled."""

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import caid
from engine.config import CaidConfig
from engine.ranks import Ranks
from engine.stages.run import RunStages, open_stages

# What an algorithm asks for, as `engine.stages.protocol.Stages` names it.
NAMES = {
    "sample_reference": "reference",
    "solve_dual": "dual",
    "fit": "update",
    "measure_slack": "slack",
}


class Message(NamedTuple):
    """A collective operation and its bytes: what all ranks put together in a gather, what each adds in a
    sum. How often a byte passes a wire is the library's matter."""

    op: str
    bytes: int


class Messages(TorchDispatchMode):
    """Notes every collective operation that this process takes part in, but for the 4 bytes in which the norm
    of spread gradients is added up: `DTensor` sends them out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Message] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func._schema.name.split("::")[-1].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and op != "wait_tensor":
            # What goes in and what comes out are arguments, and one of them is as large as the whole.
            self.seen.append(Message(op, max(_nbytes(arg) for arg in args)))
        return func(*args, **(kwargs or {}))


def _nbytes(argument: Any) -> int:
    return sum(value.nbytes for value in tree_leaves(argument) if isinstance(value, Tensor))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank did in a part of a run."""

    name: str
    messages: list[Message]
    seconds: float
    peak_bytes: int  # of the GPU's memory, 0 on a CPU

    @property
    def bytes(self) -> int:
        """Returns the bytes of all messages."""
        return sum(message.bytes for message in self.messages)


class _Noted:
    """The stages of a run, with a note of each part."""

    def __init__(self, stages: RunStages, messages: Messages) -> None:
        self.stages, self.messages, self.parts = stages, messages, []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.stages, name)
        return self._noting(NAMES[name], found) if name in NAMES else found

    def _noting(self, name: str, work: Callable) -> Callable:
        device = self.stages.job.model.device
        on_gpu = device.type == "cuda"

        def noted(*arguments):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            before, begun = len(self.messages.seen), time.perf_counter()
            result = work(*arguments)
            if on_gpu:
                torch.cuda.synchronize(device)
            self.parts.append(
                Part(
                    name=name,
                    messages=self.messages.seen[before:],
                    seconds=time.perf_counter() - begun,
                    peak_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else 0,
                )
            )
            return result

        return noted


def run_in_parts(config: CaidConfig, ranks: Ranks) -> tuple[list[Part], RunStages]:
    """Runs CAID without its verdict, and says nothing; all ranks call it. Returns the parts in their order,
    and the stages as they are at the end."""
    with (
        redirect_stdout(StringIO()),
        Messages() as messages,
        open_stages("caid", config, None, ranks) as stages,
    ):
        noted = _Noted(stages, messages)
        caid.loop(noted, config)
    return noted.parts, stages
