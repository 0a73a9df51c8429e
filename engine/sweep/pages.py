"""A sweep's table, pictures and page."""

import base64
import csv
import io
import json
import math
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from engine.files import write_whole
from engine.report.drawing import INK, REFERENCE, UNIT, frame, png
from engine.report.html import STYLE
from engine.sweep.outcomes import OneShot, Outcome
from engine.sweep.plans import numbers, shown

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999933", "#882255", "#44AA99")
LINES = ("-", "--", ":", "-.")


def write(out: Path, outcomes: list[Outcome], paths: dict[int, list[OneShot]]) -> None:
    """Write table.csv, pareto.png, multipliers.png and index.html of the runs so far."""
    rows = table(outcomes)
    write_table(out / "table.csv", rows)
    pictures = {"pareto.png": pareto(outcomes), "multipliers.png": multipliers(outcomes)}
    for name, picture in pictures.items():
        write_whole(out / name, picture)
    write_whole(out / "index.html", page(outcomes, rows, paths, pictures).encode("utf-8", "replace"))


def write_table(path: Path, rows: list[dict]) -> None:
    """The rows of `table` as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def table(outcomes: list[Outcome]) -> list[dict]:
    """A row per run: what was asked for, the held-out verdict in the run's units, and what it cost."""
    rows = []
    for o in outcomes:
        row: dict = {"algorithm": o.plan.label, "seed": o.plan.config.seed}
        if o.evaluation is None:
            rows.append({**row, **{f"{limit.name} threshold": limit.value for limit in o.limits}, "error": o.error})
            continue
        e = o.evaluation
        row |= _columns("reward", e.reward)
        for j, c in enumerate(e.constraints):
            row |= {f"{c.name} threshold": c.threshold, f"{c.name} aim": c.aim, f"{c.name} lambda": o.lam[j], f"{c.name} verdict": c.word}
            row |= _columns(c.name, c.estimate)
            if c.measured is not None:
                row |= _columns(f"{c.name} {c.kind}", c.measured)
        for name, audit in e.audits:
            row |= _columns(f"audit {name}", audit)
        row |= {"kl nats": e.kl.mean, "finished": e.finished[1], "mean length tokens": e.mean_length[1]}
        if e.refusal_harmless is not None:
            row["refusals on harmless prompts"] = e.refusal_harmless[1]
        row |= {"prompts": e.n_prompts, "responses": e.n_responses}
        row |= {"sampled tokens": o.tokens, "reference tokens": o.reference_tokens}
        rows.append({**row, "policy steps": o.steps, "seconds": round(o.seconds, 1), "error": ""})
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "") for name in names} for row in rows]


def _columns(name: str, e) -> dict:
    return {name: e.mean, f"{name} se": e.se, f"{name} low": e.low, f"{name} high": e.high}


def _groups(outcomes: list[Outcome]) -> dict[str, dict[tuple, list[Outcome]]]:
    """label -> threshold -> the outcomes of all seeds; labels in the order asked for, thresholds rising."""
    groups: dict[str, dict[tuple, list[Outcome]]] = {}
    for o in sorted((o for o in outcomes if o.evaluation is not None), key=lambda o: o.plan.threshold):
        groups.setdefault(o.plan.label, {}).setdefault(o.plan.threshold, []).append(o)
    order = list(dict.fromkeys(o.plan.label for o in outcomes))
    return {label: groups[label] for label in order if label in groups}


def _names(outcomes: list[Outcome]) -> list[str]:
    """The constraints."""
    return list(dict.fromkeys(c.name for o in outcomes if o.evaluation for c in o.evaluation.constraints)) or [""]


def pareto(outcomes: list[Outcome]) -> bytes:
    """Reward improvement against each constraint's improvement: runs with their 95 % intervals, and means over seeds joined along b."""

    def draw() -> Figure:
        groups = _groups(outcomes)
        names = _names(outcomes)
        figure = Figure(figsize=(6.5 * len(names), 5.6), dpi=130, layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for j, (axis, name) in enumerate(zip(axes, names, strict=True)):
            judged = [o.evaluation.constraints[j] for o in outcomes if o.evaluation is not None]
            needed = sorted({c.required for c in judged})
            if any(c.kind != "improvement" for c in judged):
                needed = [float(np.mean(needed))]
            for i, b in enumerate(needed):
                axis.axvline(b, color=INK, linewidth=1, linestyle=":", label="required" if i == 0 else None)
            for i, (label, by_b) in enumerate(groups.items()):
                colour = COLOURS[i % len(COLOURS)]
                means = []
                for own in by_b.values():
                    points = [(o.evaluation.constraints[j].estimate, o.evaluation.reward) for o in own]
                    for x, y in points:
                        axis.errorbar(
                            x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]],
                            fmt="none" if len(points) == 1 else "o", markersize=3, color=colour, elinewidth=0.8, alpha=0.45,
                        )  # fmt: skip
                    means.append((np.mean([x.mean for x, _ in points]), np.mean([y.mean for _, y in points])))
                axis.plot(*zip(*means, strict=True), "-o", color=colour, linewidth=1.6, markersize=7, label=shown(label)[:40])
            axis.plot(0, 0, "s", color=REFERENCE, markersize=7, zorder=3, label="reference")
            axis.margins(0.08)
            axis.set(xlabel=f"improvement of {name[:40]}, held out\n({UNIT})", ylabel=f"reward improvement, held out\n({UNIT})")
            frame(axis, "Means over seeds; runs with 95 % intervals" if _seeds(outcomes) > 1 else "Runs with 95 % intervals")
        return figure

    return png(draw)


def multipliers(outcomes: list[Outcome]) -> bytes:
    """Lambda and slack of every iteration: colours are algorithms, line styles thresholds, a line is a run."""

    def draw() -> Figure:
        groups = _groups(outcomes)
        names = _names(outcomes)
        figure = Figure(figsize=(11, 4.6 * len(names)), dpi=130, layout="constrained")
        axes = figure.subplots(len(names), 2, squeeze=False)
        thresholds = sorted({o.plan.threshold for o in outcomes})
        for j, (name, (left, right)) in enumerate(zip(names, axes, strict=True)):
            for i, (label, by_b) in enumerate(groups.items()):
                colour = COLOURS[i % len(COLOURS)]
                for threshold, own in by_b.items():
                    line = LINES[thresholds.index(threshold) % len(LINES)]
                    for o in own:
                        rows = o.iterations
                        if rows:
                            x = [row.iteration for row in rows]
                            left.plot(x, [row.lam[j] for row in rows], line, color=colour, marker="o", markersize=3)
                            slack = np.array([row.slack[j] for row in rows])
                            se = np.array([row.slack_se[j] for row in rows])
                            right.errorbar(x, slack, yerr=1.96 * se, fmt=line, color=colour, marker="o", markersize=3, elinewidth=0.6)
                        else:
                            left.axhline(o.lam[j], color=colour, linestyle=line, linewidth=1)
                left.plot([], [], color=colour, label=shown(label)[:40])
                if any(o.iterations for own in by_b.values() for o in own):
                    right.plot([], [], color=colour, label=shown(label)[:40])
            for number, threshold in enumerate(thresholds if len(thresholds) > 1 else []):
                handle = Line2D([], [], color=INK, linestyle=LINES[number % len(LINES)], label=f"b {numbers(threshold)}")
                left.add_line(handle)
            right.axhline(0, color=REFERENCE, linewidth=1, linestyle=":")
            for axis in (left, right):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            left.set(
                xlabel="iteration (level lines: algorithms that have none)", ylabel=f"lambda of {name[:40]} (run's units)", ylim=(0, None)
            )
            right.set(xlabel="iteration", ylabel=f"slack of {name[:40]}, \u00b11.96 se\n({UNIT})")
            frame(left, "Multipliers")
            frame(right, "Measured slack (improvement - aim)")
        return figure

    return png(draw)


def page(outcomes: list[Outcome], rows: list[dict], paths: dict[int, list[OneShot]], pictures: dict[str, bytes]) -> str:
    """index.html: pictures, the table, the dual along the thresholds, and the first seed's responses side by side. It loads nothing."""
    done = [o for o in outcomes if o.evaluation is not None]
    images = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>' for name, png in pictures.items()
    )
    chain = [
        [f"{x:g}" for x in (seed, one.beta, one.margin)]
        + [numbers(values) for values in (one.threshold, one.aim, one.lam, one.predicted)]
        + [f"{one.ess:.1f}"]
        for seed, path in paths.items()
        for one in path
    ]
    failed = "".join(f"<p>{escape(o.plan.folder.name)}: {escape(o.error)}</p>" for o in outcomes if o.error)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Sweep</title><style>{STYLE}.sides {{ grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }}</style></head><body>
<h1>{escape(", ".join(dict.fromkeys(shown(o.plan.label) for o in outcomes)))}: {len(done)} runs</h1>
<p>Improvements are over the reference on held-out prompts, in its within-prompt standard deviations; intervals are 95 % over prompts.
Sampled tokens and seconds are those of training; the reference's samples, which the runs of a seed share, are a column of their own.</p>
{failed}
{images}
<h2>Runs</h2>
{_html([name for name in rows[0] if not name.endswith((" se", " low", " high"))], [_shown(row) for row in rows])}
<h2>The dual along the thresholds</h2>
{_html(["seed", "beta", "margin", "b", "aim", "one-shot lambda", "predicted improvement", "effective sample size"], chain)}
<h2>Side by side</h2>
{_side_by_side([o for o in done if o.plan.config.seed == done[0].plan.config.seed]) if done else ""}
</body></html>
"""


def _shown(row: dict) -> list[str]:
    cells = []
    for name, value in row.items():
        if not name.endswith((" se", " low", " high")):
            text = f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
            text = shown(text) if name == "algorithm" else text
            cells.append(f"{text} [{row[f'{name} low']:.2f}, {row[f'{name} high']:.2f}]" if row.get(f"{name} low", "") != "" else text)
    return cells


def _html(head: list[str], body: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n" for cells in body)
    return f'<div class="scroll"><table><tr>{top}</tr>\n{lines}</table></div>'


def _side_by_side(outcomes: list[Outcome], most: int = 12) -> str:
    """The first response of the reference and of each run to the first few delicate and other prompts."""
    read = {
        o.plan.folder.name: [json.loads(line) for line in (o.plan.folder / "heldout.jsonl").read_text(encoding="utf-8").split("\n") if line]
        for o in outcomes
    }
    first = {name: {row["prompt"]: row for row in rows if row["sample"] == 0} for name, rows in read.items()}
    prompts = list(next(iter(first.values())).values())
    delicate = [row for row in prompts if row["kind"] == "delicate"]
    chosen = [*delicate[: most // 2], *[row for row in prompts if row["kind"] != "delicate"][: most - min(len(delicate), most // 2)]]
    blocks = []
    for row in chosen:
        sides = [_answer("reference", row, "reference")]
        sides += [_answer(name, rows[row["prompt"]], "policy") for name, rows in first.items() if row["prompt"] in rows]
        prompt = f'<div class="text prompt" dir="auto">{escape(row["prompt"])}</div>'
        blocks.append(
            f'<div class="sample"><div class="small">{escape(row["kind"])}</div>{prompt}<div class="sides">{"".join(sides)}</div></div>'
        )
    note = "<p class='small'>The first of each kind, not chosen; they may be offensive or wrong. Larger scores are better.</p>"
    return note + "\n".join(blocks)


def _answer(name: str, row: dict, side: str) -> str:
    scores = f"reward {row[f'{side}_reward']:.2f}, utility {numbers(row[f'{side}_utility'])}"
    return f'<div><div class="small">{escape(name)}: {escape(scores)}</div><div class="text" dir="auto">{escape(row[side])}</div></div>'


def _seeds(outcomes: list[Outcome]) -> int:
    return len({o.plan.config.seed for o in outcomes})
