"""Pictures of runs within tests: what is drawn, without its pixels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matplotlib.figure import Figure

from engine.report import drawing, panels


def contents(draw: Callable[[], Figure]) -> bytes:
    """Draws as `engine.report.drawing.png` does; returns the figure's texts and coordinates, not its pixels.

    Laying out and colouring the pixels takes a third of a small run.
    """
    figure = draw()
    parts = [text.get_text() for text in figure.texts]
    for axis in figure.axes:
        parts += [
            axis.get_title("left"),
            axis.get_xlabel(),
            axis.get_ylabel(),
            axis.get_xlim(),
            axis.get_ylim(),
        ]
        parts += [(text.get_text(), text.get_position()) for text in axis.texts]
        parts += [line.get_xydata().tolist() for line in axis.lines]
        parts += [patch.get_path().vertices.tolist() for patch in axis.patches]
        parts += [path.vertices.tolist() for lines in axis.collections for path in lines.get_paths()]
    return "\n".join(map(repr, parts)).encode()


@contextmanager
def in_pixels() -> Iterator[None]:
    """Has the pictures of runs drawn whole in this block."""
    panels.png, png = drawing.png, panels.png
    yield
    panels.png = png
