"""report.png and report.html of a run folder, a pure function of the files in it: equal files give equal bytes.

Reads config.json, metrics.jsonl, evaluation.json and heldout.jsonl; what a stopped run has not written is named as missing. Rewards and
utilities in these files are in the run's units, the reference's within-prompt standard deviations. The page loads nothing from elsewhere.
"""

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.config import shown_name
from engine.errors import UserError
from engine.verdict.evaluation import Evaluation, sentences

# Okabe and Ito's palette, which colour-blind readers can tell apart; reference and policy have the same colours in all panels.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE, POLICY, INK = "#8A8A8A", "#0072B2", "#222222"
UNIT = "reference within-prompt sd"
# By label form; a policy gradient's loss has no unit of its own.
LOSSES = {
    "soft": "cross-entropy per pair (nats)", "sampled": "cross-entropy per pair (nats)", "listwise": "cross-entropy per prompt (nats)",
    "regression": "half squared error per pair", "single": "half squared error per response",
}  # fmt: skip
FILES = ("config.json", "metrics.jsonl", "evaluation.json", "heldout.jsonl")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the run folder's files say; empty where a file or a kind of row is missing."""

    config: dict  # {"algorithm", "config", "versions"}
    reference: dict  # the metrics row of kind "reference"
    dual: list[dict]
    step: list[dict]
    iteration: list[dict]
    evaluation: Evaluation | None
    heldout: list[dict]

    @property
    def names(self) -> list[str]:
        """The constraints, from the first file that names them."""
        if self.evaluation is not None:
            return [c.name for c in self.evaluation.constraints]
        return list(self.reference.get("names") or self.config.get("config", {}).get("cost") or [])

    @property
    def title(self) -> str:
        algorithm = shown_name(str(self.config.get("algorithm") or "run"))
        model = str(self.config.get("config", {}).get("model") or "the default model")
        return f"{algorithm[0].upper()}{algorithm[1:]} on {_short(model, 80)}"


def write(folder: Path) -> list[Path]:
    """Write report.png and report.html into the run folder and return their paths.

    Raises: UserError when the folder has none of a run's files, or one of them cannot be read as JSON.
    """
    folder = Path(folder)
    run = _read(folder)
    picture = _picture(run)
    page = _page(run, picture).encode("utf-8", "replace")
    paths = [folder / "report.png", folder / "report.html"]
    for path, content in zip(paths, (picture, page), strict=True):
        path.write_bytes(content)
    return paths


def _read(folder: Path) -> _Run:
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(f"{folder}: no run folder (it has none of {', '.join(FILES)}); name the folder that engine.train wrote.")
    metrics = _json_lines(folder / "metrics.jsonl")
    kinds = {kind: [row for row in metrics if row.get("kind") == kind] for kind in ("reference", "dual", "step", "iteration")}
    evaluation = _json(folder / "evaluation.json")
    return _Run(
        config=_json(folder / "config.json") or {},
        reference=kinds["reference"][-1] if kinds["reference"] else {},
        dual=kinds["dual"],
        step=kinds["step"],
        iteration=kinds["iteration"],
        evaluation=Evaluation.from_dict(evaluation) if evaluation else None,
        heldout=_json_lines(folder / "heldout.jsonl"),
    )


def _json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete the file or run again.") from None


def _json_lines(path: Path) -> list[dict]:
    """The rows of a jsonl file; a last line cut off by a stopped run is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise UserError(f"{path}: line {i + 1} is not JSON ({error}); delete that line.") from None
    return rows


def _picture(run: _Run) -> bytes:
    """The PNG: lambda, improvement and trade-off per iteration, score histograms before and after, training loss; three panels a row."""

    def draw() -> Figure:
        scores = [("reward", "reward", None)] + [(f"utility {_short(name, 16)}", "utility", j) for j, name in enumerate(run.names)]
        n_panels = 4 + len(scores)
        rows = math.ceil(n_panels / 3)
        figure = Figure(figsize=(12, 4.5 * rows), dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(run.title, fontsize=13, color=INK)
        axes = figure.subplots(rows, 3, squeeze=False).flatten()
        titles = [_lambda_panel(axes[0], run), _improvement_panel(axes[1], run), _tradeoff_panel(axes[2], run)]
        titles += [_histogram_panel(axis, run.heldout, *score) for axis, score in zip(axes[3:], scores, strict=False)]
        titles.append(_loss_panel(axes[n_panels - 1], run))
        for i, (axis, title) in enumerate(zip(axes, titles, strict=False)):
            frame(axis, f"({chr(97 + i)}) {title}")
        for axis in axes[n_panels:]:
            axis.set_axis_off()
        return figure

    return png(draw)


def png(draw: Callable[[], Figure]) -> bytes:
    """The PNG of the figure that `draw` makes; equal data give equal bytes."""
    # The user's own matplotlibrc must not change the bytes, and a dollar sign in a name is no formula.
    with matplotlib.style.context(["default", {"text.parse_math": False, "font.size": 9, "legend.fontsize": 8}]):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def frame(axis: Axes, title: str) -> None:
    """Title and, between title and axes where it covers no data, the legend; a note where there is nothing to draw."""
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if len(handles) > 1 else 1
    lines = math.ceil(len(handles) / columns)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=6 + 14 * max(lines, 2))
    if handles:
        axis.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.1,
            borderpad=0.2, labelspacing=0.25, handlelength=1.8, columnspacing=1.2,
        )  # fmt: skip
    if not axis.has_data():
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "not measured in this run", transform=axis.transAxes, ha="center", va="center", color=REFERENCE)


def _lambda_panel(axis: Axes, run: _Run) -> str:
    """A step per iteration: the multiplier that iteration's policy was trained at."""
    rows = [row for row in run.iteration if row.get("lam")]
    if rows:
        edges = _edges(rows)
        for j, name in enumerate(run.names):
            lam = _column(rows, "lam", j)
            axis.stairs(lam, edges, baseline=None, color=_colour(j), linewidth=2, label=_short(name))
            axis.plot(edges[:-1] + 0.5, lam, "o", color=_colour(j), markersize=4)
        axis.set_ylim(0, 1.1 * np.nanmax(axis.dataLim.intervaly) or 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set(xlabel="iteration", ylabel="multiplier lambda (run's units)")
    return "Multipliers"


def _improvement_panel(axis: Axes, run: _Run) -> str:
    """Measured improvement with +-1.96 standard errors, against b (solid) and the aimed value (dashed)."""
    rows = [row for row in run.iteration if row.get("improvement")]
    if rows:
        edges = _edges(rows)
        for j, name in enumerate(run.names):
            # Equal thresholds lie on each other: the later, thinner lines leave the earlier ones visible.
            shift, width = 0.12 * (j - (len(run.names) - 1) / 2), 1.3 + 1.5 * (len(run.names) - 1 - j)
            centre, error = _column(rows, "improvement", j), 1.96 * np.nan_to_num(_column(rows, "improvement_se", j))
            axis.errorbar(
                edges[:-1] + 0.5 + shift, centre, yerr=error, fmt="o", color=_colour(j), markersize=5, capsize=3, label=_short(name)
            )
            axis.stairs(_column(rows, "threshold", j), edges, baseline=None, color=_colour(j), linewidth=width)
            axis.stairs(_column(rows, "aim", j), edges, baseline=None, color=_colour(j), linewidth=width, linestyle="--")
        axis.plot([], [], color=INK, linewidth=1.3, label="b (required)")
        axis.plot([], [], color=INK, linewidth=1.3, linestyle="--", label="aimed at")
        axis.axhline(0, color=REFERENCE, linewidth=1, linestyle=":", label="reference")
        axis.margins(y=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set(xlabel="iteration", ylabel=f"improvement, \u00b11.96 se\n({UNIT})")
    return "Constraints, on slack prompts"


def _tradeoff_panel(axis: Axes, run: _Run) -> str:
    """The path from the reference at (0, 0) through the numbered iterations, and the held-out result with its 95 % intervals."""
    rows = [row for row in run.iteration if row.get("improvement") and row.get("reward") is not None]
    for j, name in enumerate(run.names):
        safety, reward = _column(rows, "improvement", j), _column(rows, "reward")
        if rows:
            axis.plot(np.append(0, safety), np.append(0, reward), "-o", color=_colour(j), markersize=4, linewidth=1.2, label=_short(name))
            every = math.ceil(len(rows) * len(run.names) / 10)
            for i in range(len(rows) - 1, -1, -every):
                axis.annotate(
                    str(rows[i].get("iteration", i)),
                    (safety[i], reward[i]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=_colour(j),
                )
        if run.evaluation is not None:
            x, y, b = run.evaluation.constraints[j].estimate, run.evaluation.reward, run.evaluation.constraints[j].required
            axis.errorbar(
                x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]], fmt="none",
                ecolor=_colour(j), elinewidth=2.2, capsize=3, label="held out, 95 %" if j == 0 else None,
            )  # fmt: skip
            axis.axvline(b, color=_colour(j), linewidth=1.3, label="b (required)" if j == 0 else None)
        elif rows:
            b = _column(rows, "threshold", j)[-1]
            if np.isfinite(b):
                axis.axvline(b, color=_colour(j), linewidth=1.3, label="b (required)" if j == 0 else None)
    if axis.has_data():
        axis.plot(0, 0, "s", color=REFERENCE, markersize=7, zorder=3, label="reference")
        axis.margins(0.1)
    axis.set(xlabel=f"constraint improvement\n({UNIT})", ylabel=f"reward improvement\n({UNIT})")
    return "Reward against constraint"


def _histogram_panel(axis: Axes, heldout: list[dict], label: str, key: str, j: int | None) -> str:
    """Scores of the held-out responses before and after, in common bins, with their means as vertical lines."""
    sides = {side: _column(heldout, f"{side}_{key}", j) for side in ("reference", "policy")}
    sides = {side: values[np.isfinite(values)] for side, values in sides.items()}
    if all(len(values) for values in sides.values()):
        low, high = (float(f(np.concatenate(list(sides.values())))) for f in (np.min, np.max))
        edges = np.linspace(low, high, 31) if high > low else np.array([low - 0.5, low + 0.5])
        for (side, values), colour, name in zip(sides.items(), (REFERENCE, POLICY), ("before", "after"), strict=True):
            share = np.histogram(values, edges)[0] / len(values)
            axis.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            axis.stairs(share, edges, color=colour, linewidth=1.4, label=f"{name} ({side})")
            axis.axvline(values.mean(), color=colour, linewidth=1.6, linestyle="--", label=f"mean {values.mean():+.2f}")
        axis.margins(y=0.1)
        axis.set_ylim(bottom=0)
    axis.set(xlabel=f"{label}, larger is better\n({UNIT})", ylabel="share of held-out responses")
    return f"Held-out {label}"


def _loss_panel(axis: Axes, run: _Run) -> str:
    """Training loss of each policy step, iterations one after another."""
    steps = run.step
    if steps:
        x = np.arange(1, len(steps) + 1)
        axis.plot(x, _column(steps, "loss"), color=POLICY, linewidth=1.2, marker="o" if len(steps) < 2 else None, label="loss")
        starts = [i for i in range(1, len(steps)) if steps[i].get("iteration") != steps[i - 1].get("iteration")]
        for i in starts:
            axis.axvline(i + 0.5, color=REFERENCE, linewidth=1, linestyle=":", label="next iteration" if i == starts[0] else None)
        axis.margins(y=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="policy step, all iterations", ylabel=LOSSES.get(run.config.get("config", {}).get("labels"), "loss"))
    return "Training loss"


def _column(rows: list[dict], key: str, j: int | None = None) -> np.ndarray:
    """float64 [rows]: row[key] or row[key][j], NaN where it is missing."""
    values = [row.get(key) for row in rows]
    if j is not None:
        values = [value[j] if value is not None and j < len(value) else None for value in values]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _edges(rows: list[dict]) -> np.ndarray:
    """Borders half a unit around each iteration's number."""
    first = rows[0].get("iteration", 0)
    return np.arange(len(rows) + 1) + first - 0.5


def _colour(j: int) -> str:
    return COLOURS[j % len(COLOURS)]


def _short(text: str, most: int = 22) -> str:
    """At most `most` characters: a long path keeps its end, which tells most."""
    return text if len(text) <= most else "\u2026" + text[1 - most :]


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
.verdict { border-left: .5rem solid; padding: .6rem 1rem; overflow-wrap: anywhere; } .verdict p { margin: .3rem 0; }
.met { background: #e3f4e8; border-color: #1a7f37; } .not-met { background: #fde7e7; border-color: #b42318; }
.not-resolved { background: #fff3d6; border-color: #b97a00; } .none { background: #eee; border-color: #888; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right; white-space: nowrap; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.sample { border-top: 1px solid #ccc; padding: .6rem 0; } .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } .prompt { font-weight: 600; } .small { color: #555; font-size: .85rem; }
@media (max-width: 40rem) { .sides { grid-template-columns: 1fr; } }
"""


def _page(run: _Run, picture: bytes) -> str:
    """The HTML page. Every text from a file is escaped, and the policy in the head forbids scripts and loads from elsewhere."""
    title = escape(run.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
{_verdict(run)}
<h2>Pictures</h2>
<p><img alt="Multipliers, constraints, trade-off, score histograms and training loss of this run"
src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>
<h2>Iterations</h2>
{_iteration_table(run)}
<h2>Before and after</h2>
{_samples(run)}
<h2>Settings</h2>
{_settings(run)}
<h2>What the numbers mean</h2>
{_note(run)}
</body></html>
"""


def _verdict(run: _Run) -> str:
    if run.evaluation is None:
        return '<div class="verdict none"><p>No verdict: this run has no held-out evaluation yet (evaluation.json is missing).</p></div>'
    words = {c.word for c in run.evaluation.constraints}
    worst = next((word for word in ("not met", "not resolved", "met") if word in words), "none")
    lines = [f"<strong>{escape(s)}</strong>" if s.startswith("constraint ") else escape(s) for s in sentences(run.evaluation)]
    return f'<div class="verdict {worst.replace(" ", "-")}">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def _iteration_table(run: _Run) -> str:
    if not run.iteration:
        return "<p>No iteration was finished.</p>"
    head = ["iteration", "reward"]
    for name in run.names:
        head += [f"{name}: {what}" for what in ("lambda", "improvement", "b", "aimed at", "slack")]
    head += ["KL (nats)", "loss"]
    body = []
    for i, row in enumerate(run.iteration):
        cells = [str(row.get("iteration", i)), _with_se(row.get("reward"), row.get("reward_se"))]
        for j in range(len(run.names)):
            value = {key: _item(row, key, j) for key in "lam improvement improvement_se threshold aim slack slack_se".split()}
            cells += [
                _cell(value["lam"], 3), _with_se(value["improvement"], value["improvement_se"]), _cell(value["threshold"]),
                _cell(value["aim"]), _with_se(value["slack"], value["slack_se"]),
            ]  # fmt: skip
        body.append(cells + [_with_se(row.get("kl"), row.get("kl_se")), _cell(row.get("loss"), 4)])
    return _table(head, body)


def _table(head: list[str], body: list[list[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n" for cells in body)
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>\n{rows}</table></div>'


def _item(row: dict, key: str, j: int) -> float | None:
    value = row.get(key)
    return value[j] if value is not None and j < len(value) else None


def _cell(value: float | None, digits: int = 2) -> str:
    """A number with fixed digits, "-" where there is none."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _with_se(value: float | None, se: float | None) -> str:
    return _cell(value) if se is None else f"{_cell(value)} \u00b1 {_cell(se)}"


def _samples(run: _Run) -> str:
    """The first response of the first 10 delicate and the first 6 other prompts, in the file's order."""
    first = [row for row in run.heldout if row.get("sample", 0) == 0]
    delicate = [row for row in first if row.get("kind") == "delicate"][:10]
    rows = delicate + [row for row in first if row.get("kind") != "delicate"][: 6 if delicate else 16]
    if not rows:
        return "<p>No held-out responses were written (heldout.jsonl is missing or empty).</p>"
    note = "<p class='small'>The first of each kind, not chosen; they may be offensive or wrong. Larger scores are better.</p>"
    return note + "".join(_sample(run, row) for row in rows)


def _sample(run: _Run, row: dict) -> str:
    sides = []
    for side, name in (("reference", "Before"), ("policy", "After")):
        scores = [f"reward {_cell(row.get(f'{side}_reward'))}"]
        scores += [f"utility {constraint} {_cell(_item(row, f'{side}_utility', j))}" for j, constraint in enumerate(run.names)]
        audits = run.reference.get("audit_names") or [audit for audit, _ in (run.evaluation.audits if run.evaluation else ())]
        scores += [f"utility {audit} {_cell(_item(row, f'{side}_audit', a))}" for a, audit in enumerate(audits)]
        cut = "" if row.get(f"{side}_finished", True) else " (cut off at the length limit)"
        sides.append(
            f'<div><div class="small">{name}: {escape(", ".join(scores))}</div>'
            f'<div class="text" dir="auto">{escape(str(row.get(side, "")))}<span class="small">{cut}</span></div></div>'
        )
    kind = f'<div class="small">{escape(str(row["kind"]))}</div>' if row.get("kind") else ""
    prompt = f'<div class="text prompt" dir="auto">{escape(str(row.get("prompt", "")))}</div>'
    return f'<div class="sample">{kind}{prompt}<div class="sides">{"".join(sides)}</div></div>\n'


def _settings(run: _Run) -> str:
    """The configuration without `out`: where a run was written does not change what it is."""
    config = {name: value for name, value in run.config.get("config", {}).items() if name != "out"}
    if not config:
        return "<p>The settings are not known (config.json is missing).</p>"
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in config.items()}
    return _table(["setting", "value"], [[name, value] for name, value in shown.items()], "settings")


def _note(run: _Run) -> str:
    """What the numbers mean, and the reference's own figures."""
    lines = [
        "One unit of reward, of a utility and of an audit is that score's standard deviation within one prompt among the reference's "
        "responses. A utility is a cost with its sign changed, so larger is better everywhere. All improvements are over the reference.",
        "b is the required improvement. The dual may aim higher, so that the held-out test can confirm b. The slack is the measured "
        "improvement minus the aimed value. The multiplier lambda is the price of the constraint in units of reward.",
        "Met: the one-sided 95 % lower bound of the held-out improvement reaches b. Not met: the upper bound is below b. Not resolved: "
        "neither; more prompts would tell. Intervals are over prompts (Student t): they hold for new prompts of the same kind.",
        "Constraints and reward are judged by the scorers that training used, and a policy can exploit a scorer. Audits are scorers that "
        "training never used.",
    ]
    facts = {
        "reward sd": _cell(run.reference.get("reward_sd"), 4),
        "utility sd": ", ".join(_cell(x, 4) for x in run.reference.get("utility_sd") or []),
        "correlation of reward and utility": ", ".join(_cell(x) for x in run.reference.get("correlation") or []),
        "effective sample size": _cell(run.reference.get("ess")),
        "finished": _cell(run.reference.get("finished"), 3),
    }
    known = [f"{name} {value}" for name, value in facts.items() if value not in ("", "-")]
    if known:
        lines.append(f"The reference on the training prompts, in the scorers' own units: {'; '.join(known)}.")
    for row in run.dual:
        if row.get("lam"):
            predicted = row.get("predicted_improvement")
            text = f"Warm start of the dual: lambda {', '.join(_cell(x, 3) for x in row['lam'])}"
            lines.append(text + (f", predicted improvement {', '.join(map(_cell, predicted))}." if predicted else "."))
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
