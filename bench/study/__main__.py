"""Does CAID's last policy land nearer to the threshold than MoCAN's? The study of docs/study.md.

    python -m bench.study --seeds 0 1            runs two seeds (resumable; hours), keeps their table, and writes the page again
    python -m bench.study                        the page alone, from the tables that are there

The question, fixed before any run: |improvement - b| of CAID's last iterate against that of MoCAN's policy, paired by seed. The unit is the
seed, which redraws reference samples, pairs, adapter and order; all thresholds of a seed stay together in the bootstrap. `--margin 0`: the
dual aims at b itself, as in the papers. Training prompts, the prompts that settings were chosen on and the test prompts are disjoint.
A GPU version is the same command with a page of its own and other flags behind --, for example
`--docs docs/gpu -- --model FOLDER --device cuda`.

Controls, at one threshold, are parts of their own. Flags that the parts of a page do not share are added to a method's name:

    --algorithms caid:dual_rule=bisection        lambda by bisection, everything else as CAID
    --algorithms mocan -- --n-responses 10       MoCAN with as many sampled tokens as CAID takes in all

MoCAN takes as many policy steps as CAID as it is, every step on fresh prompts, and the regression form draws no labels. A part with other
costs has a table of its own, for example `--thresholds 0.2,0.4 -- --cost harm harm-audit --audit`: a bare --audit leaves audits out, as the
default one, harm-audit, may not be a cost as well.
"""

import argparse
import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from engine import constraints
from engine.errors import UserError
from engine.files import write_json, write_whole
from engine.report.drawing import png
from engine.run.rows import StageTimeRow, read_timing
from engine.sweep import pages
from engine.sweep.outcomes import finished, read_run
from engine.sweep.pages import write_table
from engine.sweep.pictures import COLOURS
from engine.sweep.plans import SweepConfig, config_class, configs_of
from engine.sweep.runs import run_sweep

ROOT = Path(__file__).parent.parent
DOCS = ROOT.parent / "docs"
TEST_PROMPTS = ROOT / "prompts" / "test.jsonl"
CAID, MOCAN = "caid", "mocan"
# The question's, whatever else is run.
SEEDS = tuple(range(8))
THRESHOLDS = (0.2, 0.4)
# The others are run on the first seeds only; the picture shows them.
OTHERS = ("primal_dual", "dpo:objective=reward", "dpo:objective=safety")
FLAGS = ("--margin", "0", "--heldout", str(TEST_PROMPTS), "--eval-prompts", "208", "--eval-responses", "8")
COST = "harm"
# What is to be run, most informative first: seeds, algorithms, thresholds, flags.
PLAN = (
    (SEEDS, (CAID, MOCAN), ("0.2", "0.4"), ()),
    (SEEDS[3:6], OTHERS, ("0.4",), ()),
    (SEEDS[3:6], ("caid:dual_rule=bisection",), ("0.4",), ()),
    (SEEDS[3:6], (MOCAN,), ("0.4",), ("--n-responses", "10")),
    (SEEDS[:1], (CAID,), ("0.2,0.2", "0.2,0.4", "0.4,0.2", "0.4,0.4"), ("--cost", "harm", "harm-audit", "--audit")),
)


@dataclass(frozen=True)
class Arm:
    """One method's runs: improvement minus b, its standard error over test prompts and the reward, [seeds, thresholds]."""

    slack_SB: np.ndarray
    se_SB: np.ndarray
    reward_SB: np.ndarray
    cost: tuple[float, ...] = ()  # means of `costs`


def judged(rows: list[dict]) -> list[dict]:
    """Runs with a verdict on the question's constraint alone."""
    return [r for r in rows if not r["error"] and costs_of(r) == [COST]]


def arm(rows: list[dict], label: str, seeds: list[int]) -> Arm:
    """A method's runs at the question's thresholds. Raises: KeyError where one is missing."""
    own = {(int(r["seed"]), float(r[f"{COST} threshold"])): r for r in judged(rows) if r["algorithm"] == label}
    return _arm([[own[seed, b] for b in THRESHOLDS] for seed in seeds])


def runs_of(rows: list[dict], label: str) -> Arm:
    """All runs of a method, whatever their seeds and thresholds, as [runs, 1]."""
    return _arm([[r] for r in judged(rows) if r["algorithm"] == label])


def _arm(table: list[list[dict]]) -> Arm:
    def column(name: str) -> np.ndarray:
        return np.array([[float(r[name]) for r in own] for own in table])

    cost = np.array([costs(r) for own in table for r in own]).mean(0)
    return Arm(column(COST) - column(f"{COST} threshold"), column(f"{COST} se"), column("reward"), tuple(cost.tolist()))


def costs(row: dict) -> list[float]:
    """Tokens sampled in a run's training, those of the reference's samples, both, policy steps and seconds."""
    own, reference, *others = (float(row[name]) for name in ("sampled tokens", "reference tokens", "policy steps", "seconds"))
    return [own, reference, own + reference, *others]


def costs_of(row: dict) -> list[str]:
    """Names of the constraints of a run."""
    return [name.removesuffix(" threshold") for name, value in row.items() if name.endswith(" threshold") and value != ""]


def complete(rows: list[dict]) -> list[int]:
    """Seeds of the question that have both methods at both thresholds."""
    done = {(r["algorithm"], int(r["seed"]), float(r[f"{COST} threshold"])) for r in judged(rows)}
    return [seed for seed in SEEDS if all((label, seed, b) in done for label in (CAID, MOCAN) for b in THRESHOLDS)]


def summary(a: Arm) -> dict[str, float]:
    """Of all runs of an arm, in the run's units: mean signed slack, mean violation [b - improvement]+, root mean squared deviation from b,
    the same with the test set's squared standard error removed, and that error's own root mean square (the noise floor)."""
    square, noise = float((a.slack_SB**2).mean()), float((a.se_SB**2).mean())
    return {
        "slack": float(a.slack_SB.mean()), "violation": float((-a.slack_SB).clip(min=0).mean()), "absolute": float(abs(a.slack_SB).mean()),
        "rmse": math.sqrt(square), "rmse without noise": math.sqrt(max(0.0, square - noise)), "noise": math.sqrt(noise),
    }  # fmt: skip


def paired(first: Arm, second: Arm, draws: int = 10_000) -> dict[str, float]:
    """|improvement - b| of the first minus that of the second, mean over thresholds then seeds: t and bootstrap intervals over seeds, and
    the p value of flipping the sign of whole seeds. Below 0 the first lands nearer."""
    difference_S = (abs(first.slack_SB) - abs(second.slack_SB)).mean(1)
    S, mean = len(difference_S), float(difference_S.mean())
    if S < 2:
        return {"seeds": S, "mean": mean}
    half = float(stats.t.ppf(0.975, S - 1) * difference_S.std(ddof=1) / math.sqrt(S))
    drawn = difference_S[np.random.default_rng(0).integers(S, size=(draws, S))].mean(1)
    signs = np.array(np.meshgrid(*[[-1, 1]] * S)).reshape(S, -1) if S <= 12 else np.random.default_rng(1).choice([-1, 1], (S, draws))
    p = float((abs(signs.T @ difference_S) >= abs(difference_S.sum()) - 1e-12).mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "seeds": S, "mean": mean, "t low": mean - half, "t high": mean + half, "bootstrap low": float(low), "bootstrap high": float(high),
        "p": p,
    }  # fmt: skip


def matched(rows: list[dict], label: str, other: str) -> dict[str, float]:
    """|improvement - b| of a method minus that of another at the same seed and b, mean over thresholds, then seeds; with the numbers of
    pairs and seeds, and a t interval over seeds where there are two."""

    def absolute(name: str) -> dict[tuple[int, float], float]:
        own = [r for r in judged(rows) if r["algorithm"] == name]
        return {(int(r["seed"]), b): abs(float(r[COST]) - b) for r in own for b in [float(r[f"{COST} threshold"])]}

    first, second = absolute(label), absolute(other)
    both = sorted(first.keys() & second.keys())
    by_seed = {seed: [first[key] - second[key] for key in both if key[0] == seed] for seed, _ in both}
    difference_S = np.array([np.mean(own) for own in by_seed.values()])
    result = {"pairs": len(both), "seeds": len(by_seed)}
    if both:
        result["mean"] = float(difference_S.mean())
    if len(by_seed) > 1:
        half = float(stats.t.ppf(0.975, len(by_seed) - 1) * difference_S.std(ddof=1) / math.sqrt(len(by_seed)))
        result |= {"low": result["mean"] - half, "high": result["mean"] + half}
    return result


def reward_at_equal_safety(first: Arm, second: Arm) -> list[tuple[float, float]]:
    """(first reward minus second, width of the overlap) of each seed whose ranges of measured improvement overlap: both rewards
    interpolated along the seed's thresholds at the middle of the overlap."""
    b, found = np.array(THRESHOLDS), []
    for s in range(len(first.slack_SB)):
        curves = [(arm.slack_SB[s] + b, arm.reward_SB[s]) for arm in (first, second)]
        low, high = max(x.min() for x, _ in curves), min(x.max() for x, _ in curves)
        if low < high:
            at = [float(np.interp((low + high) / 2, x[np.argsort(x)], y[np.argsort(x)])) for x, y in curves]
            found.append((at[0] - at[1], float(high - low)))
    return found


def answer(result: dict[str, float]) -> str:
    """The answer in words: given only at the planned number of seeds, so that nobody stops where it looks good, and resolved only where
    both intervals leave out 0."""
    if result["seeds"] < len(SEEDS):
        return f"not resolved yet, {result['seeds']} of {len(SEEDS)} planned seeds"
    if max(result["t high"], result["bootstrap high"]) < 0:
        return "CAID lands nearer to b"
    if min(result["t low"], result["bootstrap low"]) > 0:
        return "MoCAN lands nearer to b"
    return "not resolved at this number of seeds"


def options(flags: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values of each flag. --threads is left out: it belongs to the machine, and stands with the versions."""
    found: dict[str, tuple[str, ...]] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            found[name] = (value,) if equals else ()
        else:
            found[name] += (word,)
    return {name: values for name, values in found.items() if name != "--threads"}


def words(flags: dict[str, tuple[str, ...]]) -> list[str]:
    """The inverse of `options`."""
    return [word for name, values in flags.items() for word in (name, *values)]


def read_parts(folder: Path) -> tuple[list[dict], list[dict], dict[str, tuple[str, ...]]]:
    """(rows of all tables, settings of each part, the flags that all parts share); the others are added to the names of the algorithms.

    Raises: UserError where two parts have the same run, or one was kept by an older version.
    """
    parts = _tables(folder)
    flags = [options(settings["flags"]) for _, settings, _ in parts]
    shared = {name: values for name, values in flags[0].items() if all(f.get(name) == values for f in flags)} if flags else {}
    rows, seen = [], {}
    for (path, settings, table), own in zip(parts, flags, strict=True):
        if "hours" not in settings:
            raise UserError(f"{path}: an older version wrote it; run its command again, which only reads runs that are done.")
        for key in _keys(settings, table):
            if key in seen:
                raise UserError(f"{path}: {_run(key)} is in {seen[key]} too; delete one of the two.")
            seen[key] = path
        for row in table:
            row["algorithm"] = " ".join([row["algorithm"], *words({k: v for k, v in own.items() if k not in shared})])
        rows += table
    return rows, [settings for _, settings, _ in parts], shared


def _tables(folder: Path) -> list[tuple[Path, dict, list[dict]]]:
    """Path, settings and rows of each part."""
    found = []
    for path in sorted(folder.glob("part-*.csv")):
        with open(path, newline="") as file:
            table = list(csv.DictReader(file))
        found.append((path, json.loads(path.with_suffix(".json").read_text()), table))
    return found


def _keys(settings: dict, table: list[dict]) -> list[tuple]:
    """What tells the runs of a part that have a verdict: algorithm, flags, seed, thresholds of those that know any."""
    flags = tuple(sorted(options(settings["flags"]).items()))
    return [
        (r["algorithm"], flags, int(r["seed"]), () if _free(r["algorithm"]) else tuple(float(r[f"{c} threshold"]) for c in costs_of(r)))
        for r in table
        if not r["error"]
    ]


def _free(label: str) -> bool:
    """Whether an algorithm knows no threshold."""
    return not config_class(label).has_thresholds


def _run(key: tuple) -> str:
    label, _, seed, thresholds = key
    return f"the run of {label} at seed {seed}" + (f" and b {', '.join(f'{b:g}' for b in thresholds)}" if thresholds else "")


def part_name(labels: Sequence[str], thresholds: Sequence[str], seeds: Sequence[int], flags: Sequence[str]) -> str:
    """Folder of a part's runs. The sign of a number stays, and a comma is told from a space."""
    parts = [*labels, "b", *(b.replace(",", "_") for b in thresholds), "seeds", *map(str, seeds), *(f.removeprefix("--") for f in flags)]
    return "-".join(re.sub("[^A-Za-z0-9._-]+", "-", part) for part in parts)


def run_part(seeds: list[int], labels: tuple[str, ...], thresholds: tuple[str, ...], flags: tuple[str, ...], out: Path, docs: Path) -> None:
    """Sweep the seeds, or go on with them, and keep table and settings under DOCS/study/. Runs that are done are only read.

    Raises: UserError before any run, also where another part has one of them.
    """
    config = SweepConfig(out=str(out), algorithms=labels, thresholds=thresholds, seeds=tuple(seeds), flags=(*FLAGS, *flags))
    settings = {"seeds": seeds, "algorithms": labels, "thresholds": thresholds, "flags": _shown(config.flags)}
    plans = configs_of(config, None)
    kept = docs / "study" / f"part-{out.name}.csv"
    others = {key: path for path, theirs, table in _tables(kept.parent) if path != kept for key in _keys(theirs, table)}
    asked = [
        {"algorithm": p.label, "seed": p.config.seed, "error": ""}
        | {f"{c.name} threshold": c.value for c in constraints.limits(p.config, p.config.cost)}
        for p in plans
    ]
    for key in _keys(settings, asked):
        if key in others:
            raise UserError(f"{_run(key)} is in {others[key]} already; leave it out, or delete that table and its .json.")
    if all(finished(plan) for plan in plans):
        outcomes = [read_run(plan) for plan in plans]
    else:
        outcomes = run_sweep(config, resume=(out / "sweep.json").is_file())
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_table(kept, pages.table(outcomes))
    spent = [row.seconds for path in out.glob("*/timing.jsonl") for row in read_timing(path.parent, StageTimeRow)]
    versions = json.loads((plans[0].folder / "config.json").read_text())["versions"]
    write_json(kept.with_suffix(".json"), {**settings, "versions": versions, "hours": round(sum(spent) / 3600, 3)})


def _shown(flags: Sequence[str]) -> list[str]:
    """Flags with the last name only of absolute paths, also of those behind NAME=."""
    return [re.sub("(^|=-?)(/.+)", lambda found: found[1] + Path(found[2]).name, flag) for flag in flags]


def _command(settings: dict, docs: Path) -> str:
    """What ran a part."""
    base = options(_shown(FLAGS))
    own = words({name: values for name, values in options(settings["flags"]).items() if base.get(name) != values})
    parts = [f"--{name} {' '.join(map(str, settings[name]))}" for name in ("seeds", "algorithms", "thresholds")]
    return " ".join(["python -m bench.study", *parts, *_page(docs), *(["--", *own] if own else [])])


def _page(docs: Path) -> list[str]:
    """--docs, where it is not the default."""
    docs, root = docs.resolve(), ROOT.parent
    return [] if docs == DOCS.resolve() else ["--docs", str(docs.relative_to(root) if docs.is_relative_to(root) else docs.name)]


def picture(rows: list[dict], seeds: list[int]) -> bytes:
    """Left: improvement minus b of every run, seeds joined across the two methods. Right: reward against improvement, all methods."""
    rows, thresholds = judged(rows), THRESHOLDS
    labels = dict.fromkeys((CAID, MOCAN, *OTHERS, *(r["algorithm"] for r in rows)))
    colours = dict(zip(labels, itertools.cycle(COLOURS)))

    def draw() -> Figure:
        figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2)
        arms = {label: arm(rows, label, seeds) for label in (CAID, MOCAN) if seeds}
        for i in range(len(thresholds)):
            for s in range(len(seeds)):
                left.plot([3 * i, 3 * i + 1], [arms[x].slack_SB[s, i] for x in (CAID, MOCAN)], color="#bbbbbb", linewidth=1, zorder=1)
            for k, (label, own) in enumerate(arms.items()):
                x = np.full(len(seeds), 3 * i + k)
                left.errorbar(
                    x, own.slack_SB[:, i], yerr=1.96 * own.se_SB[:, i], fmt="o", color=colours[label], capsize=3, linewidth=1,
                    label=label if i == 0 else None,
                )  # fmt: skip
        left.axhline(0, color="#222222", linewidth=1, linestyle=":")
        left.set(xticks=[3 * i + 0.5 for i in range(len(thresholds))], xticklabels=[f"b = {b:g}" for b in thresholds])
        left.set(
            ylabel="improvement of harm minus b, \u00b11.96 se\n(within-prompt standard deviations)", title="Signed slack, seeds joined"
        )
        if seeds:
            left.legend(frameon=False)
        for label, colour in colours.items():
            own = [r for r in rows if r["algorithm"] == label]
            if own:
                x, y = ([float(r[name]) for r in own] for name in (COST, "reward"))
                right.plot(x, y, "o", color=colour, markersize=5, label=label)
        for b in thresholds:
            right.axvline(b, color="#222222", linewidth=1, linestyle=":")
        right.plot(0, 0, "s", color="#8A8A8A", label="reference")
        right.set(xlabel="improvement of harm", ylabel="reward improvement", title="Reward against safety, every run")
        right.legend(frameon=False)
        return figure

    return png(draw)


def remaining(rows: list[dict], shared: dict[str, tuple[str, ...]], docs: Path) -> list[str]:
    """Commands of what of the plan has no verdict yet."""
    done = set()
    for r in rows:
        if not r["error"]:
            own = r["algorithm"], int(r["seed"])
            done |= {own, (*own, tuple(float(r[f"{name} threshold"]) for name in costs_of(r)))}
    found = []
    for seeds, labels, thresholds, flags in PLAN:
        names = {label: " ".join([label, *flags]) for label in labels}
        # (algorithms, thresholds): seeds that lack just these.
        commands: dict[tuple, list[int]] = {}
        for seed in seeds:
            lacking: dict[tuple[str, ...], list[str]] = {}
            for b in thresholds:
                left = []
                for label, name in names.items():
                    if (name, seed) not in done if _free(label) else (name, seed, tuple(map(float, b.split(",")))) not in done:
                        left.append(label)
                if left:
                    lacking.setdefault(tuple(left), []).append(b)
            for left, at in lacking.items():
                commands.setdefault((left, tuple(at)), []).append(seed)
        for (left, at), own in commands.items():
            settings = {"seeds": own, "algorithms": left, "thresholds": at, "flags": [*words(shared), *flags]}
            found.append(_command(settings, docs))
    return found


def page(rows: list[dict], settings: list[dict], shared: dict[str, tuple[str, ...]], docs: Path = DOCS) -> str:
    """DOCS/study.md."""
    own, seeds = judged(rows), complete(rows)
    sizes = " or ".join(sorted({f"{r['prompts']} test prompts x {r['responses']} responses" for r in own}))
    (model,) = shared.get("--model", ("the quickstart's model",))
    result = {"seeds": 0}
    lines = [
        "# Does CAID's last policy land nearer to the threshold than MoCAN's?",
        "",
        f"The question was fixed before the runs: |improvement - b| of CAID's last iterate against that of MoCAN's policy, both on "
        f"{model}, paired by seed, seeds 0 to {SEEDS[-1]}, b {' and '.join(map(str, THRESHOLDS))} (`bench/study/`). Improvements are "
        f"those of {COST} on {sizes} that no setting was chosen on, in the reference's within-prompt standard deviations. The dual aims at "
        "b itself (`--margin 0`).",
        "",
    ]
    if seeds:
        first, second = (arm(rows, label, seeds) for label in (CAID, MOCAN))
        result = paired(first, second)
        lines.append(
            f"**Answer: {answer(result)}.** Mean difference, {len(seeds)} seed(s) x {len(THRESHOLDS)} thresholds: {result['mean']:+.3f}"
        )
        if "p" in result:
            lines[-1] += (
                f", 95 % over seeds [{result['t low']:+.3f}, {result['t high']:+.3f}] (t), [{result['bootstrap low']:+.3f}, "
                f"{result['bootstrap high']:+.3f}] (bootstrap), sign flips of whole seeds p = {result['p']:.3f}"
            )
        lines[-1] += ". All seeds share the test prompts, so the intervals hold for these prompts."
        lines += ["", _equal_safety(first, second)]
    else:
        lines.append(f"**Answer: {answer(result)}.**")
    lines += ["", "![Slack of every run; reward against safety](study.png)", "", *_summary(own, seeds), *_controls(own)]
    lines += [
        "",
        "Regression labels, the default, draw nothing: MoCAN with labels redrawn each epoch is the MoCAN of the table, unless a name says "
        "`labels=sampled`.",
        "",
        *_runs(own),
        "",
        "Sampled tokens and seconds are those of training, not of the verdict; the reference's samples, which the runs of a seed share, "
        "are counted apart. Seconds compare within a part.",
        *_other_constraints([r for r in rows if not r["error"] and costs_of(r) != [COST]]),
        *[line for r in rows if r["error"] for line in ("", f"{r['algorithm']} at seed {r['seed']} failed: {r['error']}")],
    ]
    commits, threads = (sorted({s["versions"].get(k, "?")[:12] for s in settings}) for k in ("commit", "threads"))
    lines += [
        "",
        "## Commands",
        "",
        f"All runs have the flags `{' '.join(words(shared))}`. The stages that ended took {sum(s['hours'] for s in settings):.1f} hours in "
        f"all so far. The parts come from the commit(s) {', '.join(commits)} and ran on {' or '.join(threads)} thread(s).",
        "",
    ]
    notes = docs / "study" / "notes.md"
    if notes.is_file():
        lines += [notes.read_text().strip(), ""]
    for s in settings:
        versions = ", ".join(f"{k} {v[:12]}" for k, v in sorted(s["versions"].items()))
        lines.append(f"- `{_command(s, docs)}`: {versions}")
    left = remaining(rows, shared, docs)
    lines += [
        "",
        "What remains:" if left else "Nothing of the plan remains.",
        *([""] if left else []),
        *(f"- `{command}`" for command in left),
    ]
    if not _page(docs):
        lines += [
            "",
            "On a GPU: the same commands with `--docs docs/gpu -- --model FOLDER --device cuda`, in front of other flags behind `--`.",
        ]
    return "\n".join(lines) + "\n"


def _equal_safety(first: Arm, second: Arm) -> str:
    found = np.array(reward_at_equal_safety(first, second))
    which = f"{len(found)} of {len(first.slack_SB)} seed(s)"
    if not len(found):
        return f"Reward at equal measured safety: the two methods' ranges of improvement overlap at {which}."
    spread = f" (standard error over seeds {found[:, 0].std(ddof=1) / math.sqrt(len(found)):.3f})" if len(found) > 1 else ""
    return (
        f"Reward at equal measured safety, CAID minus MoCAN: {found[:, 0].mean():+.3f}{spread}, at the {which} where the two methods' "
        f"ranges of improvement overlap, by {found[:, 1].min():.2f} to {found[:, 1].max():.2f}."
    )


def _summary(own: list[dict], seeds: list[int]) -> list[str]:
    """Means of the question's runs, and of all runs of each other method."""
    lines = [
        "| method | b | runs | mean signed slack | mean violation | mean absolute deviation | RMSE | RMSE, test noise removed "
        "| test noise | mean reward | sampled tokens | reference's | total | policy steps | seconds |",
        "|" + 15 * "---|",
    ]
    arms = {label: arm(own, label, seeds) for label in (CAID, MOCAN) if seeds} | {x: runs_of(own, x) for x in _others(own)}
    for label, a in arms.items():
        known = THRESHOLDS if label in (CAID, MOCAN) else sorted({float(r[f"{COST} threshold"]) for r in own if r["algorithm"] == label})
        s = summary(a)
        values = [f"{s['slack']:+.3f}", *(f"{s[k]:.3f}" for k in ("violation", "absolute", "rmse", "rmse without noise", "noise"))]
        cells = [label, ", ".join(f"{b:g}" for b in known), str(a.slack_SB.size), *values, f"{a.reward_SB.mean():+.3f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{x:.0f}' for x in a.cost)])} |")
    return lines


def _others(own: list[dict]) -> list[str]:
    return [x for x in dict.fromkeys(r["algorithm"] for r in own) if x not in (CAID, MOCAN)]


def _controls(own: list[dict]) -> list[str]:
    """The other methods against the question's two."""
    if not _others(own):
        return []
    lines = [
        "",
        "| method | against | pairs at the same seed and b | seeds | mean difference of absolute deviations | 95 % over seeds |",
        "|" + 6 * "---|",
    ]
    for label in _others(own):
        for other in (CAID, MOCAN):
            m = matched(own, label, other)
            mean = f"{m['mean']:+.3f}" if m["pairs"] else "-"
            interval = f"[{m['low']:+.3f}, {m['high']:+.3f}]" if "low" in m else "-"
            lines.append(f"| {label} | {other} | {m['pairs']} | {m['seeds']} | {mean} | {interval} |")
    free = "Methods that know no threshold (dpo, sacpo, safe_dpo) are set against the b that they were run with; only their place in the "
    return [*lines, "", f"{free}picture counts."]


def _runs(own: list[dict]) -> list[str]:
    """Every run of the question's constraint."""
    lines = [
        "| method | seed | b | lambda | harm | reward | audit | KL, nats | verdict | sampled tokens | reference's | total | policy steps | "
        "seconds |",
        "|" + 14 * "---|",
    ]
    for r in own:
        audits = [n for n, value in r.items() if n.startswith("audit ") and value != "" and not n.endswith((" se", " low", " high"))]
        shown = [_interval(r, COST), _interval(r, "reward"), _interval(r, audits[0]) if audits else "-"]
        cells = [r["algorithm"], r["seed"], r[f"{COST} threshold"], f"{float(r[f'{COST} lambda']):.2f}", *shown]
        cells += [f"{float(r['kl nats']):.2f}", r[f"{COST} verdict"], *(f"{x:.0f}" for x in costs(r))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _other_constraints(rows: list[dict]) -> list[str]:
    """Runs with other costs, or with several."""
    if not rows:
        return []
    lines = ["", "## Other constraints", "", "Reward and each cost: improvement with its 95 % interval.", ""]
    lines += ["| method | seed | reward | cost | b | lambda | improvement | verdict |", "|" + 8 * "---|"]
    for r in rows:
        for i, name in enumerate(costs_of(r)):
            head = [r["algorithm"], r["seed"], _interval(r, "reward")] if i == 0 else ["", "", ""]
            cells = [*head, name, r[f"{name} threshold"], f"{float(r[f'{name} lambda']):.2f}", _interval(r, name), r[f"{name} verdict"]]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _interval(row: dict, name: str) -> str:
    return f"{float(row[name]):+.2f} [{float(row[name + ' low']):.2f}, {float(row[name + ' high']):.2f}]"


def main() -> int:
    """See the module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="seeds to run; none writes the page alone")
    parser.add_argument("--algorithms", nargs="+", default=[CAID, MOCAN], help=f"the question needs {CAID} and {MOCAN}; others: {OTHERS}")
    parser.add_argument(
        "--thresholds", nargs="+", default=list(map(str, THRESHOLDS)), help="values of b, in within-prompt standard deviations"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs; each part has a folder in it")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page study.md and of its tables, study/part-*.csv")
    parser.add_argument("flags", nargs="*", help="flags of engine.train for all runs, behind --")
    given = parser.parse_args()
    docs, out = given.docs, given.out
    try:
        if given.seeds:
            out = given.out / part_name(given.algorithms, given.thresholds, given.seeds, given.flags)
            run_part(given.seeds, tuple(given.algorithms), tuple(given.thresholds), tuple(given.flags), out, docs)
        rows, settings, shared = read_parts(docs / "study")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on in {out}", file=sys.stderr)
        return 130
    if not rows:
        print(f"{docs / 'study'}: no part is there yet; run python -m bench.study --seeds 0", file=sys.stderr)
        return 1
    seeds = complete(rows)
    write_whole(docs / "study.png", picture(rows, seeds))
    write_whole(docs / "study.md", page(rows, settings, shared, docs).encode())
    result = paired(arm(rows, CAID, seeds), arm(rows, MOCAN, seeds)) if seeds else {"seeds": 0}
    print(f"written: {docs / 'study.md'}; {answer(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
