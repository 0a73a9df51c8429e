"""Commands of the study: those that ran a part, and those that remain of the plan."""

from pathlib import Path

from bench.study.flags import Flags, options, shown, words
from bench.study.parts import knows_no_threshold, thresholds_of
from bench.study.plan import DOCS, FLAGS, PLAN, ROOT, Planned


def command(settings: dict, docs: Path) -> str:
    """Returns the command that runs a part."""
    base = options(shown(FLAGS))
    flags = options(settings["flags"])
    further = words({name: values for name, values in flags.items() if base.get(name) != values})
    parts = [
        f"--{name} {' '.join(map(str, settings[name]))}" for name in ("seeds", "algorithms", "thresholds")
    ]
    behind = ["--", *further] if further else []
    return " ".join(["python -m bench.study", *parts, *docs_flag(docs), *behind])


def docs_flag(docs: Path) -> list[str]:
    """Returns --docs and its value, where it is not the default."""
    docs = docs.resolve()
    if docs == DOCS.resolve():
        return []
    return ["--docs", str(docs.relative_to(ROOT) if docs.is_relative_to(ROOT) else docs.name)]


def remaining(rows: list[dict], shared: Flags, docs: Path) -> list[str]:
    """Returns commands for the runs of the plan that have no verdict yet."""
    done = set()
    for r in rows:
        if not r["error"]:
            run = r["algorithm"], int(r["seed"])
            # A method that knows no threshold has run wherever it has.
            done |= {run, (*run, thresholds_of(r))}
    commands = []
    for planned in PLAN:
        for (labels, thresholds), seeds in _lacking(planned, done).items():
            settings = {
                "seeds": seeds,
                "algorithms": labels,
                "thresholds": thresholds,
                "flags": [*words(shared), *planned.flags],
            }
            commands.append(command(settings, docs))
    return commands


def _lacking(planned: Planned, done: set) -> dict[tuple, list[int]]:
    """Returns (algorithms, thresholds) -> the seeds that lack just these."""

    def lacks(label: str, seed: int, b: str) -> bool:
        run = " ".join([label, *planned.flags]), seed
        if knows_no_threshold(label):
            return run not in done
        return (*run, tuple(map(float, b.split(",")))) not in done

    seeds_of: dict[tuple, list[int]] = {}
    for seed in planned.seeds:
        thresholds_by_labels: dict[tuple[str, ...], list[str]] = {}
        for b in planned.thresholds:
            labels = tuple(label for label in planned.labels if lacks(label, seed, b))
            if labels:
                thresholds_by_labels.setdefault(labels, []).append(b)
        for labels, thresholds in thresholds_by_labels.items():
            seeds_of.setdefault((labels, tuple(thresholds)), []).append(seed)
    return seeds_of
