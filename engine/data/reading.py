"""How data sets are read: columns, what is left out and counted, and how many rows of a large set are held.

Published sets hold rows that no run can use: prompts that stand there before, that are too long, that have no
text. They are left out, and counted; --strict refuses them instead.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.errors import UserError
from engine.files import shown

ItemT = TypeVar("ItemT")
# Sets of at most so many rows are held whole, and what a run uses of them is chosen later, by their tokens.
HELD_WHOLE = 4096
REPEATED = "with a prompt that stands there before"
STRICT_REFUSES = " (--strict refuses them)"


class Unusable(UserError):
    """A row that is left out, unless --strict makes it an error.

    reason: what such rows are, for the count, such as "without text".
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows are read, as the flags say."""

    prompt_column: str = "prompt"
    # From a row and its place to the kind of its prompt; None: the column kind, where there is one.
    kind_of: Callable[[dict, str], str] | None = None
    response_columns: tuple[str, ...] = ()  # empty: as the layout of the row has them
    strict: bool = True  # rows that cannot be used are errors
    rows: bool = False  # whole rows are kept beside what is read from them
    # So many rows are needed: of a set of more than these and `HELD_WHOLE`, a seeded choice is held.
    # None: all are wanted.
    enough: int | None = None
    seed: int = 0

    @property
    def held(self) -> int | None:
        """Returns how many rows of a set are held at most; None for all."""
        return None if self.enough is None else max(self.enough, HELD_WHOLE)


EVERY_ROW = Rules()  # read all rows of the known layouts, and refuse those that cannot be used


class Tally:
    """Counts what was found in one source."""

    def __init__(self, source: str, strict: bool) -> None:
        self.source, self._strict = source, strict
        self.rows = self.usable = self.held = 0
        self.layouts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.first: Unusable | None = None  # of the first row that was left out for what it says itself

    @contextmanager
    def leaving_out(self, rows: int = 1) -> Iterator[None]:
        """Counts a row that cannot be used, or all `rows` of a prompt, or with --strict lets it be the error
        that it is."""
        try:
            yield
        except Unusable as error:
            if self._strict:
                raise
            if error.reason != REPEATED:
                self.first = self.first or error
            self.left_out[error.reason] += rows

    def lines(self) -> list[str]:
        """Says what rows were read as, and what was left out."""
        name = shown(self.source)
        lines = [f"{name}: read as {layout}" for layout in self.layouts if layout]
        if self.held < self.usable:
            lines.append(f"{name}: {self.held} of {self.usable} are drawn by a hash of their text")
        if self.left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            lines.append(f"{name}: left out of {self.rows} rows: {counts}{STRICT_REFUSES}")
        return lines


class Pool(Generic[ItemT]):
    """Holds, of the items that are offered, the first `size` in the order of a hash of (seed, text).

    So the choice depends neither on their order nor on the files that they stand in.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self._size, self._seed = size, seed
        self._heap: list[tuple[int, int, ItemT]] = []  # the last in that order is at the top
        self.offered = 0

    def offer(self, text: str, item: ItemT) -> None:
        """Takes an item, or drops it or another one where the pool is full."""
        digest = hashlib.blake2b(f"{self._seed} pool {text}".encode(), digest_size=16).digest()
        entry = (-int.from_bytes(digest), -self.offered, item)
        self.offered += 1
        if self._size is None or len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    @property
    def items(self) -> list[ItemT]:
        """Returns what is held, in the order in which it was offered."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: -entry[1])]

    @property
    def is_cut(self) -> bool:
        """Tells whether something was dropped."""
        return self.offered > len(self._heap)
