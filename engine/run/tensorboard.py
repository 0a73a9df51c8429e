"""Metrics rows as TensorBoard events."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield tag, float(value)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _scalars(f"{tag}/{key}", item)


class TensorBoard:
    """Writes rows as scalars named kind/field; a list's elements are kind/field/0, kind/field/1."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._count: dict[str, int] = {}

    def write(self, rows: list[dict]) -> None:
        """Adds `rows`; the horizontal axis counts the rows of each kind."""
        for row in rows:
            step = self._count.get(row["kind"], 0)
            self._count[row["kind"]] = step + 1
            for field, value in row.items():
                if field not in ("kind", "stage"):
                    for tag, scalar in _scalars(f"{row['kind']}/{field}", value):
                        self._writer.add_scalar(tag, scalar, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def tensorboard_writer(folder: str | Path) -> TensorBoard:
    """Opens a fresh writer to FOLDER/tensorboard. Older events there are removed: a resumed run writes all
    rows again, none twice.

    TensorBoard puts the time and the host into its files, so these are not equal between equal runs.
    Raises: UserError when the package is missing.
    """
    writer = _summary_writer()
    target = Path(folder) / "tensorboard"
    shutil.rmtree(target, ignore_errors=True)
    return TensorBoard(writer(str(target)))


def check_tensorboard() -> None:
    """Checks that the package is there. Raises: UserError when it is missing."""
    _summary_writer()


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter
