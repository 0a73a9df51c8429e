"""Pictures of runs and sweeps within tests: what they are drawn from, or what they show, without pixels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from matplotlib.figure import Figure

from bench.faults.children import shown
from engine.report import drawing, panels, run_page
from engine.report.run_files import RunFiles
from engine.sweep import pictures as of_sweeps


def written(run: RunFiles) -> bytes:
    """Returns what a run's picture is drawn from, in its place. Drawing takes a third of a small run."""
    return repr((run.title, run.units, replace(run, config={}))).encode()


def contents(draw: Callable[[], Figure]) -> bytes:
    """Draws as `engine.report.drawing.png` does; returns what the figure shows, not its pixels.

    Laying out and colouring the pixels takes longer than a small run.
    """
    return shown(draw())


def leave_out() -> None:
    """Leaves the pictures out of runs, and the pixels out of what is drawn of runs and sweeps."""
    run_page.picture = written
    panels.png = of_sweeps.png = contents


@contextmanager
def in_pixels() -> Iterator[None]:
    """Has the pictures of runs drawn whole in this block."""
    run_page.picture, panels.png = panels.picture, drawing.png
    yield
    leave_out()


@contextmanager
def sweeps_in_pixels() -> Iterator[None]:
    """Has the pictures of sweeps drawn whole in this block, but not those of their runs."""
    of_sweeps.png = drawing.png
    yield
    leave_out()
