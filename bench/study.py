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

MoCAN takes as many policy steps as CAID as it is, every step on fresh prompts, and the regression form draws no labels. A part with two
costs (`-- --cost harm harm-audit`, thresholds like 0.2,0.4) has a table of its own.
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

from engine import sweep
from engine.checkpoint import write_whole
from engine.errors import UserError
from engine.report import png
from engine.stages import write_json
from engine.sweep import COLOURS, SweepConfig

ROOT = Path(__file__).parent
DOCS = ROOT.parent / "docs"
TEST_PROMPTS = ROOT / "prompts" / "test.jsonl"
CAID, MOCAN = "caid", "mocan"
PLANNED = 8
THRESHOLDS = ("0.2", "0.4")
# The others are run on the first seeds only; the picture shows them.
OTHERS = ("primal_dual", "dpo:objective=reward", "dpo:objective=safety")
FLAGS = ("--margin", "0", "--heldout", str(TEST_PROMPTS), "--eval-prompts", "208", "--eval-responses", "8")
COST = "harm"


@dataclass(frozen=True)
class Arm:
    """One method's runs: improvement minus b, its standard error over test prompts and the reward, [seeds, thresholds]."""

    slack_SB: np.ndarray
    se_SB: np.ndarray
    reward_SB: np.ndarray
    cost: tuple[float, ...] = ()  # means of `costs`


def arm(rows: list[dict], label: str, seeds: list[int], thresholds: list[float]) -> Arm:
    """Raises: KeyError where a run is missing."""
    own = {(int(r["seed"]), float(r[f"{COST} threshold"])): r for r in rows if r["algorithm"] == label and not r["error"]}
    return _arm([[own[seed, b] for b in thresholds] for seed in seeds])


def runs_of(rows: list[dict], label: str) -> Arm:
    """All runs of a method, whatever their seeds and thresholds, as [runs, 1]."""
    return _arm([[r] for r in rows if r["algorithm"] == label and not r["error"]])


def _arm(table: list[list[dict]]) -> Arm:
    def column(name: str) -> np.ndarray:
        return np.array([[float(r[name]) for r in own] for own in table])

    cost = np.array([costs(r) for own in table for r in own]).mean(0)
    return Arm(column(COST) - column(f"{COST} threshold"), column(f"{COST} se"), column("reward"), tuple(cost.tolist()))


def costs(row: dict) -> list[float]:
    """Tokens sampled in a run's training, those with the reference's samples, policy steps and seconds."""
    own = float(row["sampled tokens"])
    return [own, own + float(row["reference tokens"]), float(row["policy steps"]), float(row["seconds"])]


def costs_of(row: dict) -> list[str]:
    """Names of the constraints of a run."""
    return [name.removesuffix(" threshold") for name, value in row.items() if name.endswith(" threshold") and value != ""]


def complete(rows: list[dict], labels: tuple[str, ...]) -> tuple[list[int], list[float]]:
    """Seeds at which all labels have all thresholds, and the thresholds."""
    done = {(r["algorithm"], int(r["seed"]), float(r[f"{COST} threshold"])) for r in rows if not r["error"] and r["algorithm"] in labels}
    thresholds = sorted({b for _, _, b in done})
    seeds = sorted({seed for _, seed, _ in done})
    return [seed for seed in seeds if all((label, seed, b) in done for label in labels for b in thresholds)], thresholds


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


def reward_at_equal_safety(first: Arm, second: Arm, thresholds: list[float]) -> list[float]:
    """First reward minus second, of each seed whose ranges of measured improvement overlap: both interpolated along the seed's thresholds
    at the middle of the overlap."""
    b, found = np.array(thresholds), []
    for s in range(len(first.slack_SB)):
        curves = [(arm.slack_SB[s] + b, arm.reward_SB[s]) for arm in (first, second)]
        low, high = max(x.min() for x, _ in curves), min(x.max() for x, _ in curves)
        if low < high:
            at = [float(np.interp((low + high) / 2, x[np.argsort(x)], y[np.argsort(x)])) for x, y in curves]
            found.append(at[0] - at[1])
    return found


def answer(result: dict[str, float]) -> str:
    """The answer in words: given only at the planned number of seeds, so that nobody stops where it looks good, and resolved only where
    both intervals leave out 0."""
    if result["seeds"] < PLANNED:
        return f"not resolved yet, {result['seeds']} of {PLANNED} planned seeds"
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

    Raises: UserError where two parts have the same run.
    """
    paths = sorted(folder.glob("part-*.csv"))
    settings = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    flags = [options(s["flags"]) for s in settings]
    shared = {name: values for name, values in flags[0].items() if all(f.get(name) == values for f in flags)} if flags else {}
    rows, seen = [], {}
    for path, own in zip(paths, flags, strict=True):
        with open(path, newline="") as file:
            table = list(csv.DictReader(file))
        if table and "reference tokens" not in table[0]:
            raise UserError(f"{path}: an older version wrote it; run its command again, which only reads runs that are done.")
        for row in table:
            row["algorithm"] = " ".join([row["algorithm"], *words({k: v for k, v in own.items() if k not in shared})])
            key = row["algorithm"], row["seed"], *(row[f"{name} threshold"] for name in costs_of(row))
            if key in seen:
                raise UserError(f"{path}: the run {' '.join(key)} is in {seen[key]} too; delete one of the two.")
            seen[key] = path
        rows += table
    return rows, settings, shared


def run_part(seeds: list[int], labels: tuple[str, ...], thresholds: tuple[str, ...], flags: tuple[str, ...], out: Path, docs: Path) -> None:
    """Sweep the seeds, or go on with them, and keep table and settings under DOCS/study/. Runs that are done are only read."""
    config = SweepConfig(out=str(out), algorithms=labels, thresholds=thresholds, seeds=tuple(seeds), flags=(*FLAGS, *flags))
    plans = sweep.configs_of(config, None)
    if all(sweep.finished(plan) for plan in plans):
        outcomes = [sweep.read_run(plan) for plan in plans]
    else:
        outcomes = sweep.run_sweep(config, resume=(out / "sweep.json").is_file())
    name = f"part-{out.name}"
    (docs / "study").mkdir(parents=True, exist_ok=True)
    sweep.write_table(docs / "study" / f"{name}.csv", sweep.table(outcomes))
    versions = json.loads((plans[0].folder / "config.json").read_text())["versions"]
    settings = {
        "seeds": seeds, "algorithms": labels, "thresholds": thresholds, "flags": _shown(config.flags),
        "versions": versions,
    }  # fmt: skip
    write_json(docs / "study" / f"{name}.json", settings)


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


def picture(rows: list[dict], seeds: list[int], thresholds: list[float]) -> bytes:
    """Left: improvement minus b of every run, seeds joined across the two methods. Right: reward against improvement, all methods."""
    labels = dict.fromkeys((CAID, MOCAN, *OTHERS, *(r["algorithm"] for r in rows)))
    colours = dict(zip(labels, itertools.cycle(COLOURS)))

    def draw() -> Figure:
        figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2)
        arms = {label: arm(rows, label, seeds, thresholds) for label in (CAID, MOCAN)}
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
        left.legend(frameon=False)
        for label, colour in colours.items():
            own = [r for r in rows if r["algorithm"] == label and not r["error"]]
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


def page(rows: list[dict], settings: list[dict], shared: dict[str, tuple[str, ...]], docs: Path = DOCS) -> str:
    """DOCS/study.md."""
    single, several = ([r for r in rows if (len(costs_of(r)) > 1) == many] for many in (False, True))
    rows = single
    seeds, thresholds = complete(rows, (CAID, MOCAN))
    first, second = (arm(rows, label, seeds, thresholds) for label in (CAID, MOCAN))
    result, equal = paired(first, second), reward_at_equal_safety(first, second, thresholds)
    lines = [
        "# Does CAID's last policy land nearer to the threshold than MoCAN's?",
        "",
        "The question was fixed before the runs: |improvement - b| of CAID's last iterate against that of MoCAN's policy, both on the "
        "quickstart's model and scorers, paired by seed (`bench/study.py`). Improvements are those of harm on 208 test prompts x 8 "
        "responses that no setting was chosen on, in the reference's within-prompt standard deviations. The dual aims at b itself "
        "(`--margin 0`).",
        "",
        f"**Answer: {answer(result)}.** Mean difference, {result['seeds']} seed(s) x {len(thresholds)} thresholds: {result['mean']:+.3f}"
        + (
            f", 95 % over seeds [{result['t low']:+.3f}, {result['t high']:+.3f}] (t), [{result['bootstrap low']:+.3f}, "
            f"{result['bootstrap high']:+.3f}] (bootstrap), sign flips of whole seeds p = {result['p']:.3f}."
            if "p" in result
            else "."
        ),
        "",
        "![Slack of every run; reward against safety](study.png)",
        "",
        "| method | runs | mean signed slack | mean violation | mean absolute deviation | RMSE | RMSE, test noise removed | test noise | "
        "mean reward | sampled tokens | with the reference's | policy steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    others = [x for x in dict.fromkeys(r["algorithm"] for r in rows if not r["error"]) if x not in (CAID, MOCAN)]
    for label, own in [(CAID, first), (MOCAN, second), *((x, runs_of(rows, x)) for x in others)]:
        s = summary(own)
        values = (s[k] for k in ("slack", "violation", "absolute", "rmse", "rmse without noise", "noise"))
        shown = " | ".join(f"{x:+.3f}" if i == 0 else f"{x:.3f}" for i, x in enumerate(values))
        lines.append(
            f"| {label} | {own.slack_SB.size} | {shown} | {own.reward_SB.mean():+.3f} | {' | '.join(f'{x:.0f}' for x in own.cost)} |"
        )
    lines += [
        "",
        "Methods that know no threshold are measured against the one that they were run with; only their place in the picture counts.",
    ]
    if equal:
        spread = f" (standard error over seeds {np.std(equal, ddof=1) / math.sqrt(len(equal)):.3f})" if len(equal) > 1 else ""
        lines += ["", f"Reward at equal measured safety, CAID minus MoCAN, {len(equal)} seed(s): {np.mean(equal):+.3f}{spread}."]
    lines += [
        "",
        "| method | seed | b | lambda | harm | reward | audit | KL, nats | verdict | sampled tokens | reference's | total | policy steps | "
        "seconds |",
    ]
    lines.append("|" + 14 * "---|")
    for r in rows:
        if r["error"]:
            continue
        audit = next((name for name in r if name.startswith("audit ") and not name.endswith((" se", " low", " high"))), "")
        shown = [_interval(r, n) for n in (COST, "reward", audit) if n]
        own, total, steps, seconds = costs(r)
        cost = f"{own:.0f} | {r['reference tokens']} | {total:.0f} | {steps:.0f} | {seconds:.0f}"
        lines.append(
            f"| {r['algorithm']} | {r['seed']} | {r[f'{COST} threshold']} | {float(r[f'{COST} lambda']):.2f} | {' | '.join(shown)} | "
            f"{float(r['kl nats']):.2f} | {r[f'{COST} verdict']} | {cost} |"
        )
    if several:
        lines += ["", "## Two constraints", "", "Reward and each cost: improvement with its 95 % interval.", ""]
        lines += ["| method | seed | reward | cost | b | lambda | improvement | verdict |", "|---|---|---|---|---|---|---|---|"]
        for r in several:
            for i, name in enumerate(costs_of(r)):
                head = [r["algorithm"], r["seed"], _interval(r, "reward")] if i == 0 else ["", "", ""]
                cells = [*head, name, r[f"{name} threshold"], f"{float(r[f'{name} lambda']):.2f}", _interval(r, name), r[f"{name} verdict"]]
                lines.append(f"| {' | '.join(cells)} |")
    note = "Sampled tokens and seconds are those of training: the reference's samples, which the runs of a seed share, are counted apart, "
    note += "the verdict's are not. Seconds compare within a part."
    lines += ["", f"{note} All runs have the flags `{' '.join(words(shared))}`. Commands:", ""]
    for s in settings:
        versions = ", ".join(f"{k} {v[:12]}" for k, v in sorted(s["versions"].items()))
        lines.append(f"- `{_command(s, docs)}`: {versions}")
    return "\n".join(lines) + "\n"


def _interval(row: dict, name: str) -> str:
    return f"{float(row[name]):+.2f} [{float(row[name + ' low']):.2f}, {float(row[name + ' high']):.2f}]"


def main() -> int:
    """See the module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="seeds to run; none writes the page alone")
    parser.add_argument("--algorithms", nargs="+", default=[CAID, MOCAN], help=f"the question needs {CAID} and {MOCAN}; others: {OTHERS}")
    parser.add_argument("--thresholds", nargs="+", default=list(THRESHOLDS), help="values of b, in within-prompt standard deviations")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs; each part has a folder in it")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page study.md and of its tables, study/part-*.csv")
    parser.add_argument("flags", nargs="*", help="flags of engine.train for all runs, behind --")
    given = parser.parse_args()
    docs = given.docs
    try:
        if given.seeds:
            parts = (given.algorithms, ["b", *given.thresholds], ["seeds", *map(str, given.seeds)])
            name = re.sub("[^A-Za-z0-9._]+", "-", "-".join(word for part in (*parts, given.flags) for word in part))
            run_part(given.seeds, tuple(given.algorithms), tuple(given.thresholds), tuple(given.flags), given.out / name, docs)
        rows, settings, shared = read_parts(docs / "study")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on in {given.out / name}", file=sys.stderr)
        return 130
    seeds, thresholds = complete(rows, (CAID, MOCAN))
    if not seeds:
        print("no seed has both caid and mocan at every threshold yet; run python -m bench.study --seeds 0", file=sys.stderr)
        return 1
    write_whole(docs / "study.png", picture([r for r in rows if len(costs_of(r)) == 1], seeds, thresholds))
    write_whole(docs / "study.md", page(rows, settings, shared, docs).encode())
    print(f"written: {docs / 'study.md'}; {answer(paired(arm(rows, CAID, seeds, thresholds), arm(rows, MOCAN, seeds, thresholds)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
