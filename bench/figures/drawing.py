"""The look that the pictures share."""

from matplotlib.axes import Axes


def finish(axis: Axes) -> None:
    """Takes away two spines and adds the legend."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
