"""Defines a scorer: a linear head on a model's hidden states, or a function of texts."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.data.chat import as_text
from engine.data.prompts import TextLimits
from engine.errors import UserError
from engine.files import make_folder, write_whole
from engine.model.architecture import ModelConfig
from engine.scorers import guest
from engine.scorers.answers import Answers
from engine.scorers.names import is_name

# A prompt as a text, or as the messages of its conversation.
Asked = str | list[dict[str, str]]
# (prompts, responses) -> one score per response. What else it takes, `TextScorer.keywords` names.
TextFunction = Callable[..., Sequence[float]]


def messages_of(prompt: Asked) -> list[dict[str, str]]:
    """Returns the messages of a prompt; a text is one of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


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
        if wrong := head._wrong_field():
            raise UserError(f"{file}: its {wrong}; {again}")
        if not (head.weight_D.isfinite().all() and math.isfinite(head.bias)):
            raise UserError(f"{file}: its weights are not finite; {again}")
        if not head.weight_D.any():
            raise UserError(f"{file}: its weights are all 0, so it gives every response one score; {again}")
        return head

    def _wrong_field(self) -> str:
        """Says which field holds something else than its kind of value; empty where none does."""
        if not is_name(self.name):
            return f"name is {self.name!r:.40}, not a short text"
        if type(self.layer) is not int or self.layer < 0:
            return f"layer is {self.layer!r:.40}, not a whole number of at least 0"
        if type(self.bias) not in (int, float):
            return f"bias is {self.bias!r:.40}, not a number"
        if type(self.trunk) is not str:
            return f"trunk is {self.trunk!r:.40}, not a text"
        if self.weight_D.ndim != 1:
            return f"weight has shape {list(self.weight_D.shape)}, not one number per state"
        return ""

    def check_fits(self, config: ModelConfig) -> None:
        """Refuses a head that reads other states than a model has. Raises: UserError naming them."""
        D, layers = config.hidden_size, config.num_layers
        if len(self.weight_D) != D or self.layer > layers:
            raise UserError(
                f"head {self.name}: it reads {len(self.weight_D)} states after layer {self.layer}, its model "
                f"has {D} after each of {layers}; make it again with python -m engine.train head."
            )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How N responses were sampled."""

    prompt_ids: list[list[int]]  # the prompts as the policy read them
    response_ids: list[list[int]]  # a stop token included
    finished: list[bool]  # ended by a stop token, not by the limit


@dataclass(frozen=True, kw_only=True)
class TextScorer:
    """A scorer that reads texts: a Python function, a classifier, a guard, a judge behind HTTP, a head on
    another model than the policy's."""

    name: str
    function: TextFunction
    sign: int = 1  # -1 where the user asked for the negative of this score (NAME=-SCORER)
    reads_messages: bool = False  # prompts are given to it as messages, else as texts
    # What it takes besides prompts and responses: "messages", "finished" and "row" of each, "sampled" of all.
    keywords: tuple[str, ...] = ()
    max_tokens: int | None = None  # the longest text that it reads, where there is such a limit
    # What it has cut since the last call, in lines.
    warnings: Callable[[], list[str]] = list
    counts: bool = False  # it counts something: one score for all responses is no mistake
    measures: str = ""  # "reward" or "cost", where the model says what larger values mean
    notes: tuple[str, ...] = ()  # what the user should know of the model, in lines

    def __call__(
        self,
        prompts: Sequence[Asked],
        responses: list[str],
        sampled: Sampled | None = None,
        rows: Sequence[str] = (),
    ) -> Tensor:
        """Scores N responses: float64 [N], without the sign.

        sampled: how they were sampled. Without it every response has ended by itself. rows: those that the
        prompts were read from, as JSON.
        Raises: UserError when the function fails or returns anything else than a real number per response,
        and where it takes rows and there are none.
        """
        if "row" in self.keywords and len(rows) != len(prompts):
            raise UserError(
                f"scorer {self.name}: it takes row, and the rows of these prompts were not kept, as no "
                "scorer of the run that has read them took any; let a new run or --prompts read them."
            )
        given = {
            "messages": lambda: [[dict(message) for message in messages_of(prompt)] for prompt in prompts],
            "finished": lambda: [True] * len(responses) if sampled is None else list(sampled.finished),
            "row": lambda: [json.loads(row) for row in rows],
            "sampled": lambda: sampled,
        }
        asked = list(prompts)
        if not self.reads_messages:
            asked = [as_text(messages_of(prompt)) for prompt in prompts]
        more = {name: given[name]() for name in self.keywords}
        return torch.tensor(
            guest.scores(self.name, self.function, asked, responses, more), dtype=torch.float64
        )


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

    def warnings(self) -> list[str]:
        """Says what scorers have cut since the last call, in lines."""
        return [line for scorer in self.all if isinstance(scorer, TextScorer) for line in scorer.warnings()]

    @property
    def layers(self) -> list[int]:
        """Returns the layers of the policy's model whose states heads read, ascending."""
        return sorted({s.layer for s in self.all if isinstance(s, Head)})


class LastForward:
    """Caches a model's last forward pass, so that scorers sharing the model cost one pass per batch."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward, self._texts, self._output = forward, None, None

    def __call__(self, prompts: list[Asked], responses: list[str], sampled: Sampled | None = None) -> Any:
        """Returns forward(prompts, responses), from the cache where the texts are those of the last call.

        sampled: is given to the function too, where it is not None.
        """
        texts = list(prompts), list(responses), *([] if sampled is None else [sampled])
        if self._texts != texts:
            self._output = self._forward(*texts)
            self._texts = texts
        return self._output


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """Holds what a scorer may use when it loads its weights."""

    trunk: str  # fingerprint of the policy's checkpoint
    device: torch.device
    # The models that scorers have loaded before, by fingerprint or folder; loading another one adds it.
    loaded: dict[str, Any]
    now: datetime | None = None  # the date for chat templates that write one; None: that of the clock
    dtype: torch.dtype = torch.float32  # of the weights
    tokenizer: Any = None  # the policy's
    limits: TextLimits | None = None  # how prompts are written for the policy
    answers: Answers = field(default_factory=Answers)  # what judges behind HTTP have answered
    # Between two uses the weights of models that score texts lie in the memory of the processor.
    offload: bool = False

    @contextmanager
    def placed(self, network: nn.Module) -> Iterator[None]:
        """Has the weights of a model on the device within a block, and puts them aside after it."""
        network.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                network.to("cpu")
