"""The page docs/study.md."""

import math
from pathlib import Path

import numpy as np

from bench.study.answers import answer, matched, paired, reward_at_equal_safety, summary
from bench.study.arms import Arm, arm, complete, costs, costs_of, judged, runs_of, threshold
from bench.study.commands import command, docs_flag, remaining
from bench.study.flags import Flags, words
from bench.study.plan import CAID, COST, DOCS, MOCAN, SEEDS, THRESHOLDS


def page_text(rows: list[dict], settings: list[dict], shared: Flags, docs: Path = DOCS) -> str:
    """Returns the page."""
    runs, seeds = judged(rows), complete(rows)
    lines = [
        *_question(runs, shared),
        *_answer(rows, seeds),
        "",
        "![Slack of every run; reward against safety](study.png)",
        "",
        *_summary(runs, seeds),
        *_controls(runs),
        "",
        "Regression labels, the default, draw nothing: MoCAN with labels redrawn each epoch is the MoCAN of "
        "the table, unless a name says `labels=sampled`.",
        "",
        *_runs(runs),
        "",
        "Sampled tokens and seconds are those of training, not of the verdict; the reference's samples, "
        "which the runs of a seed share, are counted apart. Seconds compare within a part.",
        *_other_constraints([r for r in rows if not r["error"] and costs_of(r) != [COST]]),
    ]
    for r in rows:
        if r["error"]:
            lines += ["", f"{r['algorithm']} at seed {r['seed']} failed: {r['error']}"]
    lines += [*_commands(settings, shared, docs), *_remaining(rows, shared, docs)]
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + len(header) * "---|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _question(runs: list[dict], shared: Flags) -> list[str]:
    sizes = {f"{r['prompts']} test prompts x {r['responses']} responses" for r in runs}
    (model,) = shared.get("--model", ("the quickstart's model",))
    return [
        "# Does CAID's last policy land nearer to the threshold than MoCAN's?",
        "",
        "The question was fixed before the runs: |improvement - b| of CAID's last iterate against that of "
        f"MoCAN's policy, both on {model}, paired by seed, seeds 0 to {SEEDS[-1]}, b "
        f"{' and '.join(map(str, THRESHOLDS))} (`bench/study/`). Improvements are those of {COST} on "
        f"{' or '.join(sorted(sizes))} that no setting was chosen on, in the reference's within-prompt "
        "standard deviations. The dual aims at b itself (`--margin 0`).",
        "",
    ]


def _answer(rows: list[dict], seeds: list[int]) -> list[str]:
    if not seeds:
        return [f"**Answer: {answer({'seeds': 0})}.**"]
    first, second = (arm(rows, label, seeds) for label in (CAID, MOCAN))
    result = paired(first, second)
    runs = f"{len(seeds)} seed(s) x {len(THRESHOLDS)} thresholds"
    line = f"**Answer: {answer(result)}.** Mean difference, {runs}: {result['mean']:+.3f}"
    if "p" in result:
        line += (
            f", 95 % over seeds [{result['t low']:+.3f}, {result['t high']:+.3f}] (t), "
            f"[{result['bootstrap low']:+.3f}, {result['bootstrap high']:+.3f}] (bootstrap), sign flips of "
            f"whole seeds p = {result['p']:.3f}"
        )
    line += ". All seeds share the test prompts, so the intervals hold for these prompts."
    return [line, "", _equal_safety(first, second)]


def _equal_safety(first: Arm, second: Arm) -> str:
    overlaps = np.array(reward_at_equal_safety(first, second))
    which = f"{len(overlaps)} of {len(first.slack_SB)} seed(s)"
    if not len(overlaps):
        return f"Reward at equal measured safety: the two methods' ranges of improvement overlap at {which}."
    difference, width = overlaps.T
    spread = ""
    if len(overlaps) > 1:
        se = difference.std(ddof=1) / math.sqrt(len(overlaps))
        spread = f" (standard error over seeds {se:.3f})"
    return (
        f"Reward at equal measured safety, CAID minus MoCAN: {difference.mean():+.3f}{spread}, at the "
        f"{which} where the two methods' ranges of improvement overlap, by {width.min():.2f} to "
        f"{width.max():.2f}."
    )


def _summary(runs: list[dict], seeds: list[int]) -> list[str]:
    """Returns the table of means of the question's runs, and of all runs of each other method."""
    header = [
        "method",
        "b",
        "runs",
        "mean signed slack",
        "mean violation",
        "mean absolute deviation",
        "RMSE",
        "RMSE, test noise removed",
        "test noise",
        "mean reward",
        "sampled tokens",
        "reference's",
        "total",
        "policy steps",
        "seconds",
    ]
    arms = {label: arm(runs, label, seeds) for label in (CAID, MOCAN) if seeds}
    arms |= {label: runs_of(runs, label) for label in _others(runs)}
    rows = []
    for label, a in arms.items():
        bs = sorted({threshold(r) for r in runs if r["algorithm"] == label})
        bs = THRESHOLDS if label in (CAID, MOCAN) else bs
        s = summary(a)
        keys = ("violation", "absolute", "rmse", "rmse without noise", "noise")
        means = [f"{s['slack']:+.3f}", *(f"{s[key]:.3f}" for key in keys), f"{a.reward_SB.mean():+.3f}"]
        cells = [label, ", ".join(f"{b:g}" for b in bs), str(a.slack_SB.size), *means]
        rows.append([*cells, *(f"{x:.0f}" for x in a.cost)])
    return _table(header, rows)


def _others(runs: list[dict]) -> list[str]:
    """Names the methods beside the question's two."""
    return [x for x in dict.fromkeys(r["algorithm"] for r in runs) if x not in (CAID, MOCAN)]


def _controls(runs: list[dict]) -> list[str]:
    """Returns the table of the other methods against the question's two."""
    if not _others(runs):
        return []
    header = [
        "method",
        "against",
        "pairs at the same seed and b",
        "seeds",
        "mean difference of absolute deviations",
        "95 % over seeds",
    ]
    rows = []
    for label in _others(runs):
        for other in (CAID, MOCAN):
            m = matched(runs, label, other)
            mean = f"{m['mean']:+.3f}" if m["pairs"] else "-"
            interval = f"[{m['low']:+.3f}, {m['high']:+.3f}]" if "low" in m else "-"
            rows.append([label, other, f"{m['pairs']}", f"{m['seeds']}", mean, interval])
    return [
        "",
        *_table(header, rows),
        "",
        "Methods that know no threshold (dpo, sacpo, safe_dpo) are set against the b that they were run "
        "with; only their place in the picture counts.",
    ]


def _runs(runs: list[dict]) -> list[str]:
    """Returns the table of every run of the question's constraint."""
    header = [
        "method",
        "seed",
        "b",
        "lambda",
        COST,
        "reward",
        "audit",
        "KL, nats",
        "verdict",
        "sampled tokens",
        "reference's",
        "total",
        "policy steps",
        "seconds",
    ]
    rows = []
    for r in runs:
        audits = [name for name, value in r.items() if name.startswith("audit ") and value != ""]
        audits = [name for name in audits if not name.endswith((" se", " low", " high"))]
        audit = _interval(r, audits[0]) if audits else "-"
        cells = [r["algorithm"], r["seed"], r[f"{COST} threshold"], f"{float(r[f'{COST} lambda']):.2f}"]
        cells += [_interval(r, COST), _interval(r, "reward"), audit]
        cells += [f"{float(r['kl nats']):.2f}", r[f"{COST} verdict"]]
        rows.append([*cells, *(f"{x:.0f}" for x in costs(r))])
    return _table(header, rows)


def _other_constraints(rows: list[dict]) -> list[str]:
    """Returns the table of runs with other costs, or with several."""
    if not rows:
        return []
    cells = []
    for r in rows:
        for i, name in enumerate(costs_of(r)):
            head = [r["algorithm"], r["seed"], _interval(r, "reward")] if i == 0 else ["", "", ""]
            lam = f"{float(r[f'{name} lambda']):.2f}"
            verdict = r[f"{name} verdict"]
            cells.append([*head, name, r[f"{name} threshold"], lam, _interval(r, name), verdict])
    header = ["method", "seed", "reward", "cost", "b", "lambda", "improvement", "verdict"]
    said = "Reward and each cost: improvement with its 95 % interval."
    return ["", "## Other constraints", "", said, "", *_table(header, cells)]


def _interval(row: dict, name: str) -> str:
    return f"{float(row[name]):+.2f} [{float(row[f'{name} low']):.2f}, {float(row[f'{name} high']):.2f}]"


def _commands(settings: list[dict], shared: Flags, docs: Path) -> list[str]:
    """Lists the commands that ran the parts, with notes of the folder where there are some."""
    commits, threads = (
        sorted({s["versions"].get(k, "?")[:12] for s in settings}) for k in ("commit", "threads")
    )
    hours = sum(s["hours"] for s in settings)
    lines = [
        "",
        "## Commands",
        "",
        f"All runs have the flags `{' '.join(words(shared))}`. The stages that ended took {hours:.1f} hours "
        f"in all so far. The parts come from the commit(s) {', '.join(commits)} and ran on "
        f"{' or '.join(threads)} thread(s).",
        "",
    ]
    notes = docs / "study" / "notes.md"
    if notes.is_file():
        lines += [notes.read_text().strip(), ""]
    for s in settings:
        versions = ", ".join(f"{k} {v[:12]}" for k, v in sorted(s["versions"].items()))
        lines.append(f"- `{command(s, docs)}`: {versions}")
    return lines


def _remaining(rows: list[dict], shared: Flags, docs: Path) -> list[str]:
    """Lists the commands that remain of the plan."""
    left = remaining(rows, shared, docs)
    lines = ["", "Nothing of the plan remains."]
    if left:
        lines = ["", "What remains:", "", *(f"- `{line}`" for line in left)]
    if not docs_flag(docs):
        lines += [
            "",
            "On a GPU: the same commands with `--docs docs/gpu -- --model FOLDER --device cuda`, in front of "
            "other flags behind `--`.",
        ]
    return lines
