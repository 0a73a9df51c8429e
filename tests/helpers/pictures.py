"""Pictures of runs within tests: what is drawn, without its pixels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matplotlib.figure import Figure

from bench.faults.children import shown
from engine.report import drawing, panels


def contents(draw: Callable[[], Figure]) -> bytes:
    """Draws as `engine.report.drawing.png` does; returns what the figure shows, not its pixels.

    Laying out and colouring the pixels takes a third of a small run.
    """
    return shown(draw())


@contextmanager
def in_pixels() -> Iterator[None]:
    """Has the pictures of runs drawn whole in this block."""
    panels.png, png = drawing.png, panels.png
    yield
    panels.png = png
