"""From the settings of a sweep to its runs: every combination of algorithm, threshold and seed,
checked before any compute."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from engine.config import ALGORITHMS, SAMPLING, RunConfig, check, preset_named, shown_name, without_epochs
from engine.config.flags import names_of, parse_flags, suggest
from engine.errors import UserError

SET_BY_SWEEP = ("seed", "threshold", "out", "samples_of")  # settings of a run that no label and no flag sets


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One set of reference samples, several algorithms, a path of thresholds."""

    out: str = "sweep"
    """Folder of the sweep, must not exist yet."""
    algorithms: tuple[str, ...] = ("caid", "mocan")
    """Algorithms, with settings where wanted: caid, mocan:steps=50, dpo:objective=safety,steps=30."""
    thresholds: tuple[str, ...] = ("0.2", "0.3", "0.4")
    """Values of --threshold, one run each. With several costs a value is one number for all, or 0.2,0.3."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each has reference samples of its own."""
    flags: tuple[str, ...] = ()
    """Flags of engine.train for all runs: what stands behind -- on the command line."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run of the sweep."""

    label: str  # the algorithm with its settings, as the user writes it
    algorithm: str
    threshold: tuple[float, ...]
    config: RunConfig
    folder: Path


def configs_of(sweep: SweepConfig, preset: str | None) -> list[Plan]:
    """Plans all runs, in the order of seeds, then thresholds, then algorithms.

    Raises: UserError for a flag, a threshold or an algorithm that cannot be used or is missing, and for two
    different runs that would have one folder.
    """
    for name in SET_BY_SWEEP:
        if name in names_of(sweep.flags):
            raise UserError(f"--{name.replace('_', '-')} behind --: the sweep sets it; see --help.")
    if "require_met" in names_of(sweep.flags):
        raise UserError("--require-met behind --: a sweep compares verdicts and needs none; leave it out.")
    for name in ("algorithms", "thresholds", "seeds"):
        if not getattr(sweep, name):
            raise UserError(f"--{name}: no value; give at least one.")
    plans: dict[Path, Plan] = {}
    for seed in sweep.seeds:
        for threshold in [_threshold(text) for text in sweep.thresholds]:
            for label in sweep.algorithms:
                plan = _plan(sweep, preset, label, threshold, seed)
                other = plans.setdefault(plan.folder, plan)
                if other.label != label:
                    raise UserError(
                        f"--algorithms {other.label} {label}: both would have the folder {plan.folder.name}; "
                        "write one of them in another way."
                    )
    for name in SAMPLING:
        if name != "seed" and len(values := {getattr(plan.config, name) for plan in plans.values()}) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise UserError(
                f"--{name.replace('_', '-')} {shown}: the runs of a sweep share the reference's samples; "
                "sweep each by itself."
            )
    known = {f.name for plan in plans.values() for f in fields(plan.config)}
    for name in names_of(sweep.flags):
        if name not in known:
            raise UserError(
                f"flag --{name.replace('_', '-')} behind --: none of {', '.join(sweep.algorithms)} has it; "
                "correct it or leave it out."
            )
    return list(plans.values())


def shown(label: str) -> str:
    """Replaces the algorithm's name in a label by the one that people read."""
    name, colon, settings = label.partition(":")
    return f"{shown_name(name)}{colon}{settings}"


def config_class(label: str) -> type[RunConfig]:
    """Returns the config class of a label's algorithm. Raises: UserError for
    an algorithm that does not exist."""
    names = [name for name, row in ALGORITHMS.items() if row.trains_policy]
    name = label.partition(":")[0]
    if name not in names:
        raise UserError(
            f"--algorithms {name}: not one of {', '.join(names)}; choose one of them.{suggest(name, names)}"
        )
    return ALGORITHMS[name].config_class


def _plan(
    sweep: SweepConfig, preset: str | None, label: str, threshold: tuple[float, ...], seed: int
) -> Plan:
    """Builds the config of one run and checks it."""
    name, _, settings = label.partition(":")
    kind = config_class(label)
    default = kind() if preset is None else preset_named(preset, name).apply(kind())
    flags = _known_flags(sweep.flags, {f.name for f in fields(kind)})
    flags += _label_flags(label, settings)
    default = without_epochs(default, flags)
    config = parse_flags(default, flags, prog="engine.sweep", usage="", first="algorithm")
    values = threshold * len(config.cost) if len(threshold) == 1 else threshold
    at = f"-b{'_'.join(map(_exact, values))}" if kind.has_thresholds else ""
    out = Path(sweep.out)
    folder = out / f"{re.sub('[:,/]', '-', label)}{at}-seed{seed}"
    config = replace(
        config, seed=seed, threshold=values, out=str(folder), samples_of=str(out / f"samples-seed{seed}")
    )
    check(config)
    return Plan(label=label, algorithm=name, threshold=values, config=config, folder=folder)


def _label_flags(label: str, settings: str) -> list[str]:
    """Turns the settings of a label into flags. Raises: UserError where a setting is the sweep's, or is given
    twice."""
    parts = [part.partition("=") for part in settings.split(",") if part]
    flags = [f"--{name.replace('_', '-')}{equals}{value}" for name, equals, value in parts]
    names = names_of(tuple(flags))
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        if name in SET_BY_SWEEP:
            instead = {"threshold": "--thresholds", "seed": "--seeds"}.get(name, "--out")
            raise UserError(f"--algorithms {label}: the sweep sets {flag}; leave it out, see {instead}.")
        if names.count(name) > 1:
            raise UserError(f"--algorithms {label}: {flag} is given twice; give it once.")
    return flags


def _exact(number: float) -> str:
    """Writes a number shortly, with as many digits as tell it from every other one."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def numbers(values: Iterable[float]) -> str:
    """Writes numbers with three digits, separated by commas."""
    return ", ".join(f"{x:.3g}" for x in values)


def _threshold(text: str) -> tuple[float, ...]:
    """Reads one value of --thresholds: a number, or one per cost."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--thresholds {text}: must be a number, or one per cost as in 0.2,0.3.") from None


def _known_flags(flags: tuple[str, ...], known: set[str]) -> list[str]:
    """Keeps the flags, with their values, that set one of the known fields."""
    kept, keeping = [], True
    for word in flags:
        if word.startswith("--"):
            keeping = names_of((word,))[0] in known
        if keeping:
            kept.append(word)
    return kept
