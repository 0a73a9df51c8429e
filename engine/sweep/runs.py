"""`python -m engine.sweep`: several algorithms along a path of thresholds, on one set of reference samples for each seed.

For each seed the reference is sampled once (run folder samples-seedSEED) and the dual is solved at all thresholds, each from its
neighbour's multipliers and for each beta and margin, before anything is trained; thresholds that the samples do not support are named
there, but for algorithms that know none. Then every run is an ordinary run folder, made by `engine.train`'s own functions with
--samples-of. After each of them the sweep's files are written anew: table.csv, pareto.png, multipliers.png and index.html.
"""

import base64
import csv
import io
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, field, fields, replace
from html import escape
from importlib import import_module
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from engine import config as configs
from engine import constraints
from engine.config import SAMPLING, DpoConfig, RunConfig, SacpoConfig, SafeDpoConfig, by_preference, check, fit, shown_name, smoke
from engine.config.flags import parse_flags, suggest, take
from engine.errors import NonFiniteError, UserError
from engine.records import Limit
from engine.report import run_page as report
from engine.report.run_page import INK, REFERENCE, STYLE, UNIT, frame, png
from engine.run.display import read_rows, read_timing
from engine.run.store import write_whole
from engine.stages import job as stages
from engine.verdict.evaluation import Evaluation

USAGE = """usage: python -m engine.sweep [flags of the sweep] [-- flags of engine.train for all runs]

    python -m engine.sweep --algorithms caid mocan --thresholds 0.2 0.3 0.4 --seeds 0 1 -- --n-prompts 200

--preset smoke    tiny random model, for trying it out
--resume FOLDER   go on with the sweep in FOLDER, with its own settings: takes no other flags
"""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999933", "#882255", "#44AA99")
LINES = ("-", "--", ":", "-.")
# Algorithms that know no threshold run once for each seed.
FREE = (DpoConfig, SacpoConfig, SafeDpoConfig)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One set of reference samples, several algorithms, a path of thresholds."""

    out: str = "sweep"
    """Folder of the sweep, must not exist yet."""
    algorithms: tuple[str, ...] = ("caid", "mocan")
    """Algorithms, with settings of their own where wanted: caid, mocan:steps=50, dpo:objective=safety,steps=30."""
    thresholds: tuple[str, ...] = ("0.2", "0.3", "0.4")
    """Values of --threshold, one run each; with several costs either one number for all, or 0.2,0.3."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each has reference samples of its own."""
    flags: tuple[str, ...] = ()
    """Flags of engine.train for all runs; what stands behind -- on the command line."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run of the sweep."""

    label: str  # the algorithm as it was asked for
    algorithm: str
    threshold: tuple[float, ...]
    config: RunConfig
    folder: Path


@dataclass(kw_only=True)
class Outcome:
    """What is known of a finished or failed run."""

    plan: Plan
    evaluation: Evaluation | None = None
    error: str = ""
    limits: list[Limit] = field(default_factory=list)  # the constraints
    lam: list[float] = field(default_factory=list)  # multipliers of the last policy
    iterations: list[dict] = field(default_factory=list)  # rows: lam, slack, slack_se
    tokens: int = 0  # sampled in training by this run
    reference_tokens: int = 0  # of the reference's samples for training, which the runs of a seed share
    steps: int = 0  # policy steps
    seconds: float = 0.0  # of training, without the reference's samples


def configs_of(sweep: SweepConfig, preset: str | None) -> list[Plan]:
    """All runs in order: seeds, then thresholds, then algorithms.

    Raises: UserError for a flag, a threshold or an algorithm that cannot be.
    """
    for name in ("seed", "threshold", "out", "samples_of"):
        if name in _flag_names(sweep.flags):
            raise UserError(f"--{name.replace('_', '-')} behind --: the sweep sets it; see --help.")
    plans: dict[Path, Plan] = {}
    for seed in sweep.seeds:
        for threshold in [_threshold(text) for text in sweep.thresholds]:
            for label in sweep.algorithms:
                plan = _plan(sweep, preset, label, threshold, seed)
                plans.setdefault(plan.folder, plan)
    for name in SAMPLING:
        if name != "seed" and len(values := {getattr(plan.config, name) for plan in plans.values()}) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise UserError(f"--{name.replace('_', '-')} {shown}: the runs of a sweep share the reference's samples; sweep each by itself.")
    known = {f.name for plan in plans.values() for f in fields(plan.config)}
    for name in _flag_names(sweep.flags):
        if name not in known:
            raise UserError(f"flag --{name.replace('_', '-')} behind --: none of {', '.join(sweep.algorithms)} has it.")
    return list(plans.values())


def shown(label: str) -> str:
    """An algorithm as it was asked for, under the name that people read."""
    name, colon, own = label.partition(":")
    return f"{shown_name(name)}{colon}{own}"


def config_class(label: str) -> type[RunConfig]:
    """Of an algorithm as it is asked for, with or without settings. Raises: UserError for one that is not there."""
    from engine.train import ALGORITHMS

    names = [name for name in ALGORITHMS if name != "head"]
    name = label.partition(":")[0]
    if name not in names:
        raise UserError(f"--algorithms {name}: not one of {', '.join(names)}.{suggest(name, names)}")
    return getattr(configs, ALGORITHMS[name][0])


def _plan(sweep: SweepConfig, preset: str | None, label: str, threshold: tuple[float, ...], seed: int) -> Plan:
    name, _, own = label.partition(":")
    kind = config_class(label)
    default = kind() if preset is None else smoke(kind())
    flags = _known_flags(sweep.flags, {f.name for f in fields(kind)})
    flags += [f"--{part.replace('_', '-')}" for part in own.split(",") if part]
    config = parse_flags(kind, flags, prog="engine.sweep", usage="", first="algorithm", default=default)
    values = threshold * len(config.cost) if len(threshold) == 1 else threshold
    at = "" if issubclass(kind, FREE) else f"-b{'_'.join(f'{b:g}' for b in values)}"
    out = Path(sweep.out)
    folder = out / f"{re.sub('[:,/]', '-', label)}{at}-seed{seed}"
    config = replace(config, seed=seed, threshold=values, out=str(folder), samples_of=str(out / f"samples-seed{seed}"))
    check(config)
    return Plan(label=label, algorithm=name, threshold=values, config=config, folder=folder)


def _begun(folder: Path) -> str | None:
    """The folder where a run in it can go on; what a run left that was killed before it began is removed."""
    if (folder / "config.json").is_file():
        return str(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def run_sweep(sweep: SweepConfig, preset: str | None = None, *, resume: bool = False) -> list[Outcome]:
    """Do all runs that are not done yet and write the sweep's files.

    Raises: UserError before anything is sampled, or where the samples do not support a threshold; Interrupted.
    """
    out = Path(sweep.out)
    plans = configs_of(sweep, preset)
    if not resume:
        # What a kill leaves before sweep.json is there is nothing.
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= {"sweep.json.tmp"}):
            raise UserError(f"--out {out} exists; name another folder, or go on with --resume {out}.")
        out.mkdir(parents=True, exist_ok=True)
        settings = {"preset": preset, **{f.name: getattr(sweep, f.name) for f in fields(sweep) if f.name != "out"}}
        stages.write_json(out / "sweep.json", settings)
    paths = {}
    for seed in sweep.seeds:
        own = [plan for plan in plans if plan.config.seed == seed]
        paths[seed] = draw_samples(own)
    outcomes: list[Outcome] = []
    for number, plan in enumerate(plans, 1):
        print(f"\nrun {number} of {len(plans)}: {plan.folder.name}", flush=True)
        outcomes.append(read_run(plan, _train(plan)))
        write(out, outcomes, paths)
    print(f"\nsweep: {out / 'index.html'}, {out / 'table.csv'}, {out / 'pareto.png'}, {out / 'multipliers.png'}")
    return outcomes


def draw_samples(plans: list[Plan]) -> list[dict]:
    """The reference's samples of one seed, and the dual along the thresholds for each beta and margin: rows of threshold, beta, margin,
    aim, lambda and what it predicts. Not of algorithms without a threshold, nor of scores that are only there after policies are aligned.

    Raises: UserError for thresholds beyond what the samples support, before anything is trained.
    """
    # Settings of iterative algorithms also say which prompts measure a slack; the samples do not depend on them.
    config = replace(plans[0].config, samples_of="", out=plans[0].config.samples_of)
    rows, guess, seen = [], None, []
    with stages.open_job("samples", config, _begun(Path(config.out)), n_stages=2) as job:
        world = stages.World(job)
        world.heldout("heldout/reference", None, -1)
        for plan in sorted(plans, key=lambda plan: (plan.config.beta, plan.config.margin, plan.threshold)):
            if isinstance(plan.config, FREE) or by_preference(plan.config):
                continue
            own, _ = fit(plan.config, len(job.train), len(job.heldout))
            reference = stages.reference_of(replace(job, config=own), world.reference.prompts, world.reference.sampled, None)
            aim_J, beta = reference.aim_J, own.beta
            problem = aim_J.tolist(), reference.limits, beta, own.lam_max, own.force
            if problem in seen:
                continue
            seen.append(problem)
            try:
                solution = stages.one_shot(replace(job, config=own), reference, start_J=guess)
            except UserError as error:
                raise UserError(
                    f"--thresholds {','.join(f'{b:g}' for b in plan.threshold)}: {error} Or leave it out; all other flags of a sweep stand "
                    "behind --."
                ) from error
            guess = solution.lam
            rows.append({
                "threshold": plan.threshold, "beta": beta, "margin": own.margin, "aim": aim_J.tolist(), "lam": solution.lam.tolist(),
                "predicted": solution.predicted_improvement.tolist(), "ess": float(solution.ess.mean()),
            })  # fmt: skip
            job.run.display.line(
                f"b {_numbers(plan.threshold)} (beta {beta:g}, margin {own.margin:g}): aim {_numbers(aim_J.tolist())}, one-shot lambda "
                f"{_numbers(solution.lam.tolist())}, effective sample size {rows[-1]['ess']:.1f} of {own.n_responses}"
            )
    return rows


def finished(plan: Plan) -> bool:
    """Whether a run has its verdict and its report."""
    return (plan.folder / "evaluation.json").is_file() and (plan.folder / "report.html").is_file()


def _train(plan: Plan) -> str:
    """Train and judge, or go on with a run that was stopped, unless it is done; returns what it failed with, or ""."""
    if not (plan.folder / "evaluation.json").is_file():
        from engine.train import module_of

        train = import_module(module_of(plan.algorithm)).train
        try:
            train(plan.config, resume=_begun(plan.folder))
        except NonFiniteError as stop:
            print(f"error: {stop}", file=sys.stderr)
            return str(stop)
    elif not finished(plan):
        report.write(plan.folder)
    return ""


def read_run(plan: Plan, error: str = "") -> Outcome:
    """What the folder of a run says that is done, or has failed with `error`."""
    (reference,) = read_rows(plan.folder, "reference")
    tokens, seconds = effort(plan.folder)
    reference_tokens, _ = effort(Path(plan.config.samples_of))
    outcome = Outcome(
        plan=plan, error=error, limits=constraints.limits(plan.config, reference["names"]),
        tokens=sum(n for stage, n in tokens.items() if _training(stage)),
        reference_tokens=reference_tokens.get("reference", 0), steps=len(read_rows(plan.folder, "step")),
        seconds=sum(s for stage, s in seconds.items() if _training(stage)), iterations=read_rows(plan.folder, "iteration"),
    )  # fmt: skip
    if not error:
        outcome.evaluation = Evaluation.from_dict(json.loads((plan.folder / "evaluation.json").read_text()))
        outcome.lam = kept_lam(plan.folder) or outcome.iterations[0]["lam"]
    return outcome


def kept_lam(folder: Path) -> list[float] | None:
    """The multipliers that the judged policy of a run was trained at; None where --max-kl rejected the first one, so that the verdict is
    on the reference."""
    kept = [row for row in read_rows(folder, "policy") if not (folder / "adapters" / f"rejected-{row['iteration']}").is_dir()]
    return kept[-1]["lam"] if kept else None


def effort(folder: Path) -> tuple[dict[str, int], dict[str, float]]:
    """(sampled tokens, seconds) of each stage of a run, of its last attempt alone: one that was interrupted sampled the same responses.
    Seconds that a policy stage took before it was interrupted are so left out."""
    tokens, seconds = {}, {}
    for row in read_timing(folder):
        if row["kind"] == "stage":
            seconds[row["stage"]] = row["seconds"]
        elif "tokens" in row:
            tokens[row["stage"]] = row["tokens"]
    return tokens, seconds


def _training(stage: str) -> bool:
    return stage != "reference" and not stage.startswith("heldout/")


def write(out: Path, outcomes: list[Outcome], paths: dict[int, list[dict]]) -> None:
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
                            x = [row["iteration"] for row in rows]
                            left.plot(x, [row["lam"][j] for row in rows], line, color=colour, marker="o", markersize=3)
                            slack, se = (np.array([row[key][j] for row in rows]) for key in ("slack", "slack_se"))
                            right.errorbar(x, slack, yerr=1.96 * se, fmt=line, color=colour, marker="o", markersize=3, elinewidth=0.6)
                        else:
                            left.axhline(o.lam[j], color=colour, linestyle=line, linewidth=1)
                left.plot([], [], color=colour, label=shown(label)[:40])
                if any(o.iterations for own in by_b.values() for o in own):
                    right.plot([], [], color=colour, label=shown(label)[:40])
            for number, threshold in enumerate(thresholds if len(thresholds) > 1 else []):
                handle = Line2D([], [], color=INK, linestyle=LINES[number % len(LINES)], label=f"b {_numbers(threshold)}")
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


def page(outcomes: list[Outcome], rows: list[dict], paths: dict[int, list[dict]], pictures: dict[str, bytes]) -> str:
    """index.html: pictures, the table, the dual along the thresholds, and the first seed's responses side by side. It loads nothing."""
    done = [o for o in outcomes if o.evaluation is not None]
    images = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>' for name, png in pictures.items()
    )
    chain = [
        [f"{x:g}" for x in (seed, row["beta"], row["margin"])]
        + [_numbers(row[name]) for name in ("threshold", "aim", "lam", "predicted")]
        + [f"{row['ess']:.1f}"]
        for seed, own in paths.items()
        for row in own
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
    scores = f"reward {row[f'{side}_reward']:.2f}, utility {_numbers(row[f'{side}_utility'])}"
    return f'<div><div class="small">{escape(name)}: {escape(scores)}</div><div class="text" dir="auto">{escape(row[side])}</div></div>'


def _seeds(outcomes: list[Outcome]) -> int:
    return len({o.plan.config.seed for o in outcomes})


def _numbers(values) -> str:
    return ", ".join(f"{x:.3g}" for x in values)


def _threshold(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--thresholds {text}: must be a number, or one per cost as in 0.2,0.3.") from None


def _flag_names(flags: tuple[str, ...]) -> list[str]:
    return [flag.partition("=")[0][2:].removeprefix("no-").replace("-", "_") for flag in flags if flag.startswith("--")]


def _known_flags(flags: tuple[str, ...], known: set[str]) -> list[str]:
    """The flags, with their values, that are fields of a config."""
    kept, keeping = [], True
    for word in flags:
        if word.startswith("--"):
            keeping = _flag_names((word,))[0] in known
        if keeping:
            kept.append(word)
    return kept


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    out = ""
    try:
        cut = argv.index("--") if "--" in argv else len(argv)
        own, common = argv[:cut], argv[cut + 1 :]
        own, resume = take(own, "--resume")
        own, preset = take(own, "--preset")
        if preset not in (None, "smoke"):
            raise UserError(f"--preset {preset}: the only preset is smoke.")
        if resume is not None:
            if own or common or preset:
                raise UserError(f"--resume {resume}: takes no other flags; the sweep goes on with its own settings.")
            sweep, preset = _resumed(resume)
        else:
            sweep = parse_flags(SweepConfig, own, prog="python -m engine.sweep", usage=USAGE, first="sweep's name", default=SweepConfig())
            if sweep is None:
                return 0
            sweep = replace(sweep, flags=(*sweep.flags, *common))
        out = sweep.out
        run_sweep(sweep, preset, resume=resume is not None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted: to go on, python -m engine.sweep --resume {out or 'FOLDER'}", file=sys.stderr)
        return 130
    return 0


def _resumed(folder: str) -> tuple[SweepConfig, str | None]:
    """(settings, preset) of the sweep in a folder."""
    try:
        settings = json.loads((Path(folder) / "sweep.json").read_text(encoding="utf-8"))
        preset = settings.pop("preset")
        return SweepConfig(out=folder, **{name: tuple(value) for name, value in settings.items()}), preset
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume {folder}: no sweep is there ({type(error).__name__} at sweep.json); name the folder that --out made."
        ) from error
