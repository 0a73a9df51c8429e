"""A sweep's table and page."""

import base64
import csv
import io
import math
from html import escape
from pathlib import Path

from engine.files import read_json_lines, write_whole
from engine.intervals import Estimate
from engine.records import UNIT_NAMES
from engine.report import html
from engine.sweep.outcomes import OneShot, Outcome
from engine.sweep.pictures import multipliers, pareto
from engine.sweep.plans import numbers, shown

STYLE = ".sides { grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }"
PARTS = (" se", " low", " high")  # the columns that follow a mean; the page shows the interval beside it


def write(out: Path, outcomes: list[Outcome], paths: dict[int, list[OneShot]]) -> None:
    """Writes table.csv, pareto.png, multipliers.png and index.html of the runs so far."""
    rows = table(outcomes)
    write_table(out / "table.csv", rows)
    pictures = {"pareto.png": pareto(outcomes), "multipliers.png": multipliers(outcomes)}
    for name, picture in pictures.items():
        write_whole(out / name, picture)
    write_whole(out / "index.html", page(outcomes, rows, paths, pictures).encode("utf-8", "replace"))


def write_table(path: Path, rows: list[dict]) -> None:
    """Writes the rows of `table` as CSV. A text that a spreadsheet would run as a formula begins with a
    quote there; numbers stay numbers."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, rows[0]))
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    write_whole(path, text.getvalue().encode())


def _cell(value: object) -> object:
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def table(outcomes: list[Outcome]) -> list[dict]:
    """Returns a row for each run: what was asked for, the held-out verdict, and what it cost."""
    rows = []
    for o in outcomes:
        row: dict = {"algorithm": o.plan.label, "seed": o.plan.config.seed}
        if o.evaluation is None:
            rows.append(
                {**row, **{f"{limit.name} threshold": limit.value for limit in o.limits}, "error": o.error}
            )
            continue
        e = o.evaluation
        row |= _columns("reward", e.reward)
        for j, c in enumerate(e.constraints):
            row |= {f"{c.name} threshold": c.limit.value, f"{c.name} aim": c.aim}
            row |= {f"{c.name} lambda": o.lam[j], f"{c.name} verdict": c.word}
            row |= _columns(c.name, c.estimate)
            if c.measured is not None:
                row |= _columns(f"{c.name} {c.limit.kind}", c.measured)
        for name, audit in e.audits:
            row |= _columns(f"audit {name}", audit)
        row |= {
            "log-ratio nats" if e.truncated else "kl nats": e.kl.mean,
            "finished": e.finished[1],
            "mean length tokens": e.mean_length[1],
        }
        if e.refusal_harmless is not None:
            row["refusals on harmless prompts"] = e.refusal_harmless[1]
        row |= {"prompts": e.n_prompts, "responses": e.n_responses}
        row |= {"sampled tokens": o.tokens, "reference tokens": o.reference_tokens}
        rows.append({**row, "policy steps": o.steps, "seconds": round(o.seconds, 1), "error": ""})
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "") for name in names} for row in rows]


def _columns(name: str, e: Estimate) -> dict:
    return {name: e.mean, f"{name} se": e.se, f"{name} low": e.low, f"{name} high": e.high}


def page(
    outcomes: list[Outcome],
    rows: list[dict],
    paths: dict[int, list[OneShot]],
    pictures: dict[str, bytes],
) -> str:
    """Returns index.html: pictures, table, the dual along the thresholds, and responses side by side."""
    done = [o for o in outcomes if o.evaluation is not None]
    images = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'
        for name, png in pictures.items()
    )
    names = [name for name in rows[0] if not name.endswith(PARTS)]
    of_seed = [o for o in done if o.plan.config.seed == done[0].plan.config.seed]
    chain = [
        [f"{x:g}" for x in (seed, one.beta, one.margin)]
        + [numbers(values) for values in (one.threshold, one.aim, one.lam, one.predicted)]
        + [f"{one.ess:.1f}"]
        for seed, path in paths.items()
        for one in path
    ]
    failed = "".join(f"<p>{escape(o.plan.folder.name)}: {escape(o.error)}</p>" for o in outcomes if o.error)
    units = UNIT_NAMES[outcomes[0].plan.config.units]
    algorithms = ", ".join(dict.fromkeys(shown(o.plan.label) for o in outcomes))
    chain_head = ["seed", "beta", "margin", "b", "aim", "one-shot lambda", "predicted improvement"]
    body = f"""<h1>{escape(algorithms)}: {len(done)} runs</h1>
<p>Improvements are over the reference on held-out prompts, in {units};
intervals are 95 % over prompts. Sampled tokens and seconds are those of training; the reference's samples,
which the runs of a seed share, are a column of their own. Each run's word is its own, at the confidence of a
single verdict. Whoever chooses one of these runs by this table judges the choice on other prompts:
<code>python -m engine.evaluate RUN --prompts OTHERS</code>.</p>
{failed}
{images}
<h2>Runs</h2>
{html.table(names, [_shown(row) for row in rows])}
<h2>The dual along the thresholds</h2>
{html.table([*chain_head, "effective sample size"], chain)}
<h2>Side by side</h2>
{_side_by_side(of_seed) if done else ""}"""
    return html.document("Sweep", body, STYLE)


def _shown(row: dict) -> list[str]:
    cells = []
    for name, value in row.items():
        if name.endswith(PARTS):
            continue
        text = f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
        if name == "algorithm":
            text = shown(text)
        if row.get(f"{name} low", "") != "":
            text += f" [{row[f'{name} low']:.2f}, {row[f'{name} high']:.2f}]"
        cells.append(text)
    return cells


def _side_by_side(outcomes: list[Outcome], most: int = 12) -> str:
    """Shows the first responses of the reference and of each run to a few delicate and other prompts."""
    first = {o.plan.folder.name: _first_responses(o.plan.folder) for o in outcomes}
    prompts = list(next(iter(first.values())).values())
    chosen = [row for row in prompts if row["kind"] == "delicate"][: most // 2]
    chosen += [row for row in prompts if row["kind"] != "delicate"][: most - len(chosen)]
    blocks = []
    for row in chosen:
        sides = [_answer("reference", row, "reference")]
        sides += [
            _answer(name, rows[row["prompt"]], "policy")
            for name, rows in first.items()
            if row["prompt"] in rows
        ]
        prompt = f'<div class="text prompt" dir="auto">{escape(row["prompt"])}</div>'
        kind = f'<div class="small">{escape(row["kind"])}</div>'
        blocks.append(f'<div class="sample">{kind}{prompt}<div class="sides">{"".join(sides)}</div></div>')
    return html.SAMPLES_NOTE + "\n".join(blocks)


def _first_responses(folder: Path) -> dict[str, dict]:
    """Reads the rows of a run's first held-out responses, by prompt."""
    rows = read_json_lines(folder / "heldout.jsonl", cure=f"go on with --resume {folder}")
    return {row["prompt"]: row for row in rows if row["sample"] == 0}


def _answer(name: str, row: dict, side: str) -> str:
    scores = f"reward {row[f'{side}_reward']:.2f}, utility {numbers(row[f'{side}_utility'])}"
    text = f'<div class="text" dir="auto">{escape(row[side])}</div>'
    return f'<div><div class="small">{escape(name)}: {escape(scores)}</div>{text}</div>'
