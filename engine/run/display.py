"""Collects what a run shows and leaves to read: the display, the metrics rows, TensorBoard
events and where the time went.

metrics.jsonl holds one JSON object per row with "kind" and "stage" and is bitwise equal between equal runs;
every time and speed is in timing.jsonl alone. Both are written by `engine.run.store`.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_PERIOD_S = 15.0


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 2 min 5 s, 3 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Progress:
    """One running count; `with display.progress(768, "responses", "rollout")
    as progress: progress.advance(32)`."""

    def __init__(self, display: "Display", total: int, unit: str, what: str) -> None:
        self.total, self.unit, self.what, self.done = total, unit, what, 0
        self._display = display
        self._start = self._printed = display.clock()

    def advance(self, n: int = 1) -> None:
        """Counts `n` more units."""
        self.done += n
        now = self._display.clock()
        if not self._display.live and now - self._printed >= PLAIN_PERIOD_S:
            self._printed = now
            self._display.line(f"  {self}")

    def speed(self) -> float:
        """Units per second since the start; 0 before the first unit."""
        elapsed = self._display.clock() - self._start
        return self.done / elapsed if elapsed > 0 else 0.0

    def time_left(self) -> str:
        """Times to the end at the mean speed so far; "" while unknown."""
        speed = self.speed()
        return f"{duration(max(self.total - self.done, 0) / speed)} left" if speed > 0 else ""

    def __str__(self) -> str:
        left = self.time_left()
        return f"{self.what}: {self.done}/{self.total} {self.unit}, {self.speed():.1f} {self.unit}/s" + (
            f", {left}" if left else ""
        )

    def __enter__(self) -> "Progress":
        self._display.running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.running.remove(self)
        if not self._display.live and self._printed > self._start and kind is None:
            self._display.line(
                f"  {self.what}: {self.done} {self.unit} in {duration(self._display.clock() - self._start)}"
            )


class Display:
    """A live status block under permanent lines where stdout is a terminal, plain lines elsewhere.

    As a context manager it draws the block and puts the terminal back at the end, also after an error.
    """

    def __init__(
        self,
        *,
        n_stages: int | None = None,
        file: TextIO | None = None,
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """silent: nothing is shown, as on other ranks than the first."""
        self.n_stages, self.clock = n_stages, clock
        self.running: list[Progress] = []
        self._console = Console(file=file, highlight=False, emoji=False, markup=False, quiet=silent)
        self._terminal = (file or sys.stdout).isatty() and not self._console.is_dumb_terminal and not silent
        self._live: Live | None = None
        self._stage = self._notice = ""

    @property
    def live(self) -> bool:
        """Tells whether the status block is drawn now."""
        return self._live is not None

    def stage(self, number: int, name: str, *, loaded: bool = False) -> None:
        """Says which stage runs, counted from 1, or that its result was found on disk."""
        of = f" of {self.n_stages}" if self.n_stages else ""
        self._stage = f"stage {number}{of}: {name}"
        if loaded or not self.live:
            self.line(self._stage + (" (loaded)" if loaded else ""))

    def progress(self, total: int, unit: str, what: str) -> Progress:
        """Opens a progress bar over `total` units (a plural, such as "tokens");
        use it as a context manager."""
        return Progress(self, total, unit, what)

    def line(self, text: str) -> None:
        """Prints one permanent line, above the block if there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints one permanent warning line."""
        self._console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    def table(self, rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
        """Prints a permanent table: the first column to the left, the others to the right."""
        table = Table(box=None, pad_edge=False)
        for i, header in enumerate(headers):
            table.add_column(Text(header), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._console.print(table)

    def notice(self, text: str) -> None:
        """Says something from a signal handler, where printing through Python's buffers could fail."""
        self._notice = text
        if not self.live:
            with suppress(OSError):  # stderr may be closed
                os.write(2, f"\n{text}\n".encode())

    def _block(self) -> RenderableType:
        lines: list[RenderableType] = [Text(self._stage, style="bold", no_wrap=True, overflow="ellipsis")]
        for progress in list(self.running):
            grid = Table.grid(padding=(0, 1), expand=True)
            grid.add_column(no_wrap=True, overflow="ellipsis", max_width=20)
            grid.add_column(ratio=1, min_width=6)
            for _ in range(3):
                grid.add_column(no_wrap=True, justify="right")
            bar = ProgressBar(total=max(progress.total, 1), completed=progress.done)
            speed = f"{progress.speed():.1f} {progress.unit}/s"
            grid.add_row(
                Text(progress.what),
                bar,
                Text(f"{progress.done}/{progress.total}"),
                Text(speed),
                Text(progress.time_left()),
            )
            lines.append(grid)
        if self._notice:
            lines.append(Text(self._notice, style="yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def __enter__(self) -> "Display":
        if self._terminal:
            self._live = Live(
                get_renderable=self._block, console=self._console, refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
