"""Work on prompts that the ranks share out: each does its part, and all get the whole result."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.errors import NonFiniteError
from engine.ranks import Ranks
from engine.records import Prompts

RecordT = TypeVar("RecordT")


def by_shares(ranks: Ranks, prompts: Prompts, work: Callable[[range, Prompts], RecordT | None]) -> RecordT:
    """Returns what `work` makes of all prompts; each rank works on its share, and ranks that hold one model
    together on the same one.

    work: gets the places of consecutive prompts and these prompts. It returns a tensor, or a record of
    tensors and lists, that goes from prompt to prompt; on a rank without prompts None. There it is called
    too, as the ranks may gather weights in it together.

    Raises: on all ranks NonFiniteError where `work` raises it on any, so that they can all go on with
    something else.
    """
    if ranks.size == 1:
        return work(range(len(prompts)), prompts)
    own = ranks.share(len(prompts))
    try:
        part = work(own, prompts.select(list(own)))
    except NonFiniteError as error:
        part = error
    parts = [part for part in ranks.of_shares(part) if part is not None]
    for part in parts:
        if isinstance(part, NonFiniteError):
            raise part
    return joined(parts)


def joined(parts: Sequence[RecordT]) -> RecordT:
    """Puts records of consecutive prompts together: tensors and lists one after the other, records field by
    field; anything else is the same in all of them."""

    def together(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat(values)
        if isinstance(first, list):
            return [item for value in values for item in value]
        if is_dataclass(first):
            return type(first)(
                **{f.name: together([getattr(value, f.name) for value in values]) for f in fields(first)}
            )
        assert all(value == first for value in values), values
        return first

    return together(list(parts))
