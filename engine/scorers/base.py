"""Defines a scorer: a linear head on a model's hidden states, or a function of texts."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import UserError
from engine.files import make_folder, write_whole

# (prompts, responses) -> one score per response
TextFunction = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear score of a response: weight . mean(states of its tokens after `layer` layers) + bias."""

    name: str
    layer: int
    weight_D: Tensor  # float64 [D]
    bias: float
    trunk: str  # fingerprint of the checkpoint whose states the head reads
    sign: int = 1  # -1 where the user asked for the negative of this score (NAME=-SCORER)

    def __call__(self, pooled_ND: Tensor) -> Tensor:
        """Scores pooled states [N, D]: float64 [N], without the sign."""
        return pooled_ND.double() @ self.weight_D.to(pooled_ND.device) + self.bias

    def save(self, folder: Path) -> None:
        """Writes FOLDER/head.safetensors."""
        make_folder(folder)
        about = {"name": self.name, "layer": self.layer, "bias": self.bias, "trunk": self.trunk}
        metadata = {"head": json.dumps(about, sort_keys=True)}
        data = safetensors.torch.save({"weight": self.weight_D.contiguous()}, metadata=metadata)
        write_whole(folder / "head.safetensors", data)

    @staticmethod
    def load(folder: Path) -> "Head":
        """Reads what `save` wrote.

        Raises: UserError for another file, and for a head whose weights are all 0 or not finite.
        """
        file = folder / "head.safetensors"
        again = "make it again with python -m engine.train head."
        try:
            with safe_open(file, framework="pt") as stored:
                weight_D = stored.get_tensor("weight").double()
                head = Head(weight_D=weight_D, **json.loads(stored.metadata()["head"]))
        except Exception as error:
            reason = type(error).__name__
            raise UserError(
                f"{file}: not a score head ({reason}); make one with python -m engine.train head."
            ) from error
        if not (head.weight_D.isfinite().all() and math.isfinite(head.bias)):
            raise UserError(f"{file}: its weights are not finite; {again}")
        if not head.weight_D.any():
            raise UserError(f"{file}: its weights are all 0, so it gives every response one score; {again}")
        return head


@dataclass(frozen=True, kw_only=True)
class TextScorer:
    """A scorer that reads texts: a Python function, a classifier, a head on
    another model than the policy's."""

    name: str
    function: TextFunction
    sign: int = 1  # -1 where the user asked for the negative of this score (NAME=-SCORER)

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores N responses: float64 [N], without the sign.

        Raises: UserError when the function fails or returns the wrong number of scores.
        """
        try:
            scores = [float(x) for x in self.function(prompts, responses)]
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(f"scorer {self.name} raised {type(error).__name__}: {reason}") from error
        if len(scores) != len(responses):
            raise UserError(
                f"scorer {self.name} returned {len(scores)} scores for {len(responses)} responses; "
                "return one per response."
            )
        return torch.tensor(scores, dtype=torch.float64)


Scorer = Head | TextScorer


@dataclass(frozen=True, kw_only=True)
class Scorers:
    """The scorers of a run."""

    reward: Scorer
    costs: tuple[Scorer, ...]
    audits: tuple[Scorer, ...]  # costs that are reported and never optimised

    @property
    def all(self) -> tuple[Scorer, ...]:
        """Returns reward, costs, audits, in this order."""
        return (self.reward, *self.costs, *self.audits)

    @property
    def layers(self) -> list[int]:
        """Returns the layers of the policy's model whose states heads read, ascending."""
        return sorted({s.layer for s in self.all if isinstance(s, Head)})


class LastForward:
    """Caches a model's last forward pass, so that scorers sharing the model cost one pass per batch."""

    def __init__(self, forward: Callable[[list[str], list[str]], Any]) -> None:
        self._forward, self._texts, self._output = forward, None, None

    def __call__(self, prompts: list[str], responses: list[str]) -> Any:
        """Returns forward(prompts, responses), from the cache where the texts are those of the last call."""
        if self._texts != (prompts, responses):
            self._output = self._forward(prompts, responses)
            self._texts = list(prompts), list(responses)
        return self._output


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """Holds what a scorer may use when it loads its weights."""

    trunk: str  # fingerprint of the policy's checkpoint
    device: torch.device
    # The models that scorers have loaded before, by fingerprint or folder; loading another one adds it.
    loaded: dict[str, Any]
    now: datetime | None = None  # the date for chat templates that write one; None: that of the clock
