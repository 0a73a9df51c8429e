"""What a scorer is: a head on the trunk's states, or a function of texts."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import UserError
from engine.files import write_whole

TextFunction = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear score of a response: weight . mean(states of the response's tokens after `layer` decoder layers) + bias."""

    name: str
    layer: int
    weight_D: Tensor  # float64 [D]
    bias: float
    trunk: str  # fingerprint of the checkpoint whose states it reads
    sign: int = 1  # the score is sign x what it says

    def __call__(self, pooled_ND: Tensor) -> Tensor:
        """Scores float64 [N] of pooled states [N, D]."""
        return pooled_ND.double() @ self.weight_D.to(pooled_ND.device) + self.bias

    def save(self, folder: Path) -> None:
        """Write FOLDER/head.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = json.dumps({"name": self.name, "layer": self.layer, "bias": self.bias, "trunk": self.trunk}, sort_keys=True)
        write_whole(folder / "head.safetensors", safetensors.torch.save({"weight": self.weight_D.contiguous()}, metadata={"head": meta}))

    @staticmethod
    def load(folder: Path) -> "Head":
        """Read what `save` wrote. Raises UserError when it is no such file, or a head that says nothing."""
        file = folder / "head.safetensors"
        try:
            with safe_open(file, framework="pt") as stored:
                head = Head(weight_D=stored.get_tensor("weight").double(), **json.loads(stored.metadata()["head"]))
        except Exception as error:
            raise UserError(f"{file}: not a score head ({type(error).__name__}); make one with python -m engine.train head.") from error
        if not (head.weight_D.isfinite().all() and math.isfinite(head.bias)):
            raise UserError(f"{file}: its weights are not finite; make it again with python -m engine.train head.")
        if not head.weight_D.any():
            raise UserError(f"{file}: its weights are all 0, so that it says nothing; make it again with python -m engine.train head.")
        return head


@dataclass(frozen=True, kw_only=True)
class TextScorer:
    """A scorer of texts: a Python function, or a sequence-classification model."""

    name: str
    function: TextFunction
    sign: int = 1  # the score is sign x what it says

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores float64 [N]. Raises UserError when the scorer fails or returns the wrong count."""
        try:
            scores = [float(x) for x in self.function(prompts, responses)]
        except Exception as error:
            raise UserError(
                f"scorer {self.name} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        if len(scores) != len(responses):
            raise UserError(f"scorer {self.name} returned {len(scores)} scores for {len(responses)} responses; return one per response.")
        return torch.tensor(scores, dtype=torch.float64)


Scorer = Head | TextScorer


@dataclass(frozen=True, kw_only=True)
class Scorers:
    """The run's scorers, and the trunks of heads that sit on another model than the policy."""

    reward: Scorer
    costs: tuple[Scorer, ...]
    audits: tuple[Scorer, ...]

    @property
    def all(self) -> tuple[Scorer, ...]:
        """Reward, costs, audits, in this order."""
        return (self.reward, *self.costs, *self.audits)

    @property
    def layers(self) -> list[int]:
        """The trunk's layers that heads read, ascending."""
        return sorted({s.layer for s in self.all if isinstance(s, Head)})


class Reading:
    """What a model says of texts, for all the scorers that share it: the last texts' is kept, so that each batch is read once.

    read(prompts, responses): one forward pass over them.
    """

    def __init__(self, read: Callable[[list[str], list[str]], Any]) -> None:
        self._read, self._texts, self._said = read, None, None

    def __call__(self, prompts: list[str], responses: list[str]) -> Any:
        """read(prompts, responses)."""
        if self._texts != (prompts, responses):
            self._said = self._read(prompts, responses)
            self._texts = list(prompts), list(responses)
        return self._said


# Models that read texts, by fingerprint or folder: (their reading, what its scorers take from it).
Shared = dict[str, tuple[Reading, Any]]
