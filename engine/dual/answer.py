"""What `python -m engine.dual` answers: solves, prints, and writes its files."""

import json
import math
from pathlib import Path

from torch import Tensor

from engine import dual
from engine.dual.analysis import Analysis, analyse, as_dict, trace_curve
from engine.dual.config import FILES, DualConfig, output_folder
from engine.dual.picture import picture
from engine.dual.scores_file import preference_pairs, read_scores
from engine.files import whole_files, write_whole
from engine.run.display import Display


def answer(file: str, config: DualConfig) -> None:
    """Solves, prints, and writes dual.json, dual.png and the pairs.

    Raises: UserError; dual.Infeasible, a UserError too, with the largest thresholds that are supported.
    """
    table = read_scores(file, config.utility, config.cost, texts=bool(config.export_pairs))
    analysis = analyse(file, table, config)
    out = output_folder(file, config)
    display = Display()
    print_analysis(analysis, display)
    curve = trace_curve(analysis)
    content = json.dumps(as_dict(analysis, curve), indent=2, allow_nan=False) + "\n"
    with whole_files(out, FILES) as folder:
        write_whole(folder / "dual.json", content.encode())
        write_whole(folder / "dual.png", picture(analysis, curve))
    display.line(f"wrote {out / 'dual.json'} and {out / 'dual.png'}")
    if config.export_pairs:
        score_PG = analysis.reward_PG + analysis.utility_PGJ @ analysis.solution.lam
        rows, n_alike = preference_pairs(table, score_PG, config.seed)
        write_whole(Path(config.export_pairs), "".join(json.dumps(row) + "\n" for row in rows).encode())
        left_out = (
            f", {n_alike} prompt(s) left out, as their best and worst response are alike" if n_alike else ""
        )
        display.line(f"wrote {config.export_pairs}: {len(rows)} pairs{left_out}")


def print_analysis(analysis: Analysis, display: Display) -> None:
    """Prints what was read, a paragraph for each constraint, the reward and the warnings."""
    config, solution, (P, G, J) = analysis.config, analysis.solution, analysis.utility_PGJ.shape
    names = analysis.table.names
    roles = [
        f"{name} is a {'cost, negated' if name in config.cost else 'utility, larger is better'}"
        for name in names
    ]
    display.line(f"{analysis.file}: {P} prompts x {G} responses; {'; '.join(roles)}")
    units = zip(["reward", *names], analysis.units, strict=True)
    sizes = ", ".join(f"{name} {unit:.4g}" for name, unit in units)
    which = (
        "those of the file"
        if config.units == "raw"
        else f"within-prompt standard deviations, which are {sizes} of the file's"
    )
    display.line(f"units: {which}; beta {config.beta:g}, b and lambda are in them")
    for j in range(J):
        for line in _constraint_lines(analysis, j):
            display.line(line)
    if J > 1 and analysis.multiple == math.inf:
        display.line("any multiple of the required improvements is supported, as none is above 0")
    elif J > 1:
        together = _decimals(analysis.b_J * analysis.multiple + analysis.shift_J)
        display.line(
            f"largest supported together: {analysis.multiple:.3f} x the required improvements, "
            f"{_word(config)} = {together}"
        )
    gain, gain_se = float(analysis.gain_P.mean()), float(dual.standard_error(analysis.gain_P))
    at_zero = f"(at lambda 0: {analysis.gain_at_zero:+.3f})"
    display.line(f"reward: predicted improvement {gain:+.3f} +- {gain_se:.3f} {at_zero}")
    display.line(
        f"effective sample size {solution.ess.mean():.1f} of {G}; value of the dual {solution.value:.6g}; "
        f"KKT residual {solution.kkt:.1e}"
    )
    for warning in analysis.warnings:
        display.warn(warning)


def _constraint_lines(analysis: Analysis, j: int) -> list[str]:
    config, solution, word = analysis.config, analysis.solution, _word(analysis.config)
    se_J = dual.standard_error(analysis.improvement_PJ)
    said = dual.said(solution.lam[j : j + 1], analysis.interval.of(j), analysis.reward_PG.shape[1])
    largest = analysis.alone_J[j] + analysis.shift_J[j]
    alone = " alone" if len(analysis.table.names) > 1 else ""
    return [
        f"constraint {analysis.table.names[j]}: {word} {config.threshold[j]:.3f}, lambda {said}",
        f"  predicted improvement {solution.predicted_improvement[j]:+.3f} +- {se_J[j]:.3f} "
        f"(at lambda 0: {analysis.at_zero_J[j]:+.3f}); largest supported {word} {largest:.3f}{alone}",
    ]


def _word(config: DualConfig) -> str:
    """Names what --threshold gives."""
    return "level" if config.absolute else "b"


def _decimals(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())
