"""The flags of `python -m engine.dual SCORES`, and what may stand in them."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.config.bounds import LARGEST_SCORE, bounded, check_bounds, one_of
from engine.config.run import RunConfig
from engine.errors import UserError
from engine.files import check_out, is_file, is_folder, is_there, reading

FILES = ("dual.json", "dual.png")


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """Multipliers of a threshold from a file of scores, without training."""

    threshold: tuple[float, ...] = bounded((), at_least=-LARGEST_SCORE, at_most=LARGEST_SCORE)
    """b of each constraint: required improvement over the mean of its column, in --units."""
    absolute: bool = False
    """The thresholds are levels of the utility (of minus the cost), not improvements."""
    beta: float = bounded(RunConfig.beta, at_least=1e-8, at_most=1e8)
    """Weight of KL(policy || reference), in units of the reward; by default that of a run."""
    utility: tuple[str, ...] = ()
    """Columns that are larger where better. Default without --cost: all other columns with numbers."""
    cost: tuple[str, ...] = ()
    """Columns that are smaller where better: they are negated once."""
    units: str = one_of("deviation", "raw")
    """deviation: columns are divided by their within-prompt standard deviations, as in a run; raw: the file's
    own units."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the labels of pairs."""
    out: str = ""
    """Folder for dual.json and dual.png, which are overwritten. Default: NAME-dual for NAME.jsonl."""
    export_pairs: str = ""
    """Also write the best and the worst response of each prompt at lambda to this jsonl file, new or of an
    earlier call: prompt, chosen, rejected. Which of the two is chosen is drawn, with the probability
    sigmoid(difference of reward + lambda utility)."""


def output_folder(file: str, config: DualConfig) -> Path:
    """Returns the folder of --out, by default one named after the scores file."""
    return Path(config.out or f"{Path(file).stem}-dual")


def check(file: str, config: DualConfig) -> None:
    """Refuses flags that cannot be used, before the scores file is read.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    if not file:
        raise UserError(
            "the scores file is missing: python -m engine.dual SCORES.jsonl --threshold B; see --help."
        )
    _check_numbers(config)
    _check_names(config)
    check_out(output_folder(file, config), FILES)
    if config.export_pairs:
        _check_export(Path(config.export_pairs), Path(file))


def _check_numbers(config: DualConfig) -> None:
    if not config.threshold:
        raise UserError(
            "--threshold is missing: give the required improvement of each constraint, "
            "for example --threshold 0.3."
        )
    check_bounds(config)


def _check_names(config: DualConfig) -> None:
    for name, count in Counter([*config.utility, *config.cost]).items():
        if count > 1:
            raise UserError(f"--utility and --cost: two constraints are named {name}; name each column once.")
        if name in ("prompt", "response", "reward"):
            raise UserError(f"--utility or --cost {name}: that column has its own meaning; name another one.")


def _holds_pairs(file: Path) -> bool:
    """Tells whether a file was written by --export-pairs, so that it may be written again. Raises: UserError
    where it cannot be read."""
    with reading(file, cure="name another file"), open(file, encoding="utf-8") as lines:
        first = lines.readline()
    return not first or '"score_chosen": ' in first


def _check_export(target: Path, scores: Path) -> None:
    flag = f"--export-pairs {target}"
    if target.suffix != ".jsonl":
        raise UserError(f"{flag}: must end in .jsonl.")
    if os.path.realpath(target) == os.path.realpath(scores):
        raise UserError(f"{flag}: that is the scores file; name another one.")
    if is_there(target) and not is_file(target):
        what = "a folder" if is_folder(target) else "no file but a pipe, a device or a link"
        raise UserError(f"{flag}: that is {what}; name a file.")
    if is_there(target) and not _holds_pairs(target):
        raise UserError(f"{flag}: that file holds no pairs of this command; name another one.")
    if not is_folder(target.parent):
        raise UserError(f"{flag}: the folder {target.parent} does not exist; make it first.")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{flag}: no file can be made in {target.parent}; name another folder.")
