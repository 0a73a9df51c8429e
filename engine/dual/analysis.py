"""What `python -m engine.dual SCORES --threshold B` does: multipliers, their uncertainty and the trade-off, from a file of scores.

SCORES is jsonl or parquet with one row per response: `prompt` (text or a whole number), `reward`, one column for each utility or cost,
and `response` where pairs are exported. All prompts have the same number of responses; their rows need not stand together.
"""

import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.config.flags import parse_flags
from engine.data import prompts as data
from engine.dual import solver as dual
from engine.errors import UserError
from engine.report.run_page import COLOURS, INK, POLICY, REFERENCE, frame, png
from engine.run.display import Display
from engine.run.store import write_whole
from engine.scorers.scoring import utility_of_cost

SUFFIXES = (".jsonl", ".parquet")
USAGE = """usage: python -m engine.dual SCORES.(jsonl|parquet) --threshold B [B ...] [flags]

SCORES has one row per response: prompt (text or a whole number), reward, one column per utility or cost, and response where pairs are
exported. Thresholds stand in the order of the --utility names, then the --cost names.
"""


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """Multipliers of a threshold from a file of scores, without training."""

    threshold: tuple[float, ...] = ()
    """b of each constraint: required improvement over the mean of the column, in units of --raw or its default."""
    absolute: bool = False
    """The thresholds are levels of the utility (of minus the cost), not improvements."""
    beta: float = 1.0
    """Weight of KL(policy || reference), in units of the reward."""
    utility: tuple[str, ...] = ()
    """Columns that are larger where better. Default, where no --cost is given either: all other columns with numbers."""
    cost: tuple[str, ...] = ()
    """Columns that are smaller where better: they are negated once."""
    raw: bool = False
    """Keep the file's units. Default: every column is divided by its pooled within-prompt standard deviation, as a run does."""
    draws: int = 400
    """Bootstrap samples of the prompts."""
    seed: int = 0
    """Seed of the bootstrap and of the labels of pairs."""
    out: str = ""
    """Folder for dual.json and dual.png, which are overwritten. Default: the name of SCORES with -dual, in this folder."""
    export_pairs: str = ""
    """Also write the best and the worst response of each prompt at lambda to this jsonl file: prompt, chosen, rejected. Which of the two is
    chosen is drawn, with the probability sigmoid(difference of reward + lambda utility)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The scores of a file, in its units; larger is better (costs are negated)."""

    prompts: list[str | int]  # [P], in the order of their first rows
    responses: list[list[str]] | None  # [P][G]
    reward_PG: Tensor  # float64
    utility_PGJ: Tensor  # float64
    names: list[str]  # [J]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        file, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
        config = parse_flags(DualConfig, flags, prog="python -m engine.dual SCORES", usage=USAGE, first="scores file", default=DualConfig())
        if config is None:
            return 0
        check(file, config)
        run(file, config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: start the command again", file=sys.stderr)
        return 130
    return 0


def check(file: str, config: DualConfig) -> None:
    """Refuse what cannot be used before the file is read.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    if not file:
        raise UserError("the scores file is missing: python -m engine.dual SCORES.jsonl --threshold B; see --help.")
    if not config.threshold:
        raise UserError("--threshold is missing: give the required improvement of each constraint, for example --threshold 0.3.")
    for b in config.threshold:
        if not math.isfinite(b):
            raise UserError(f"--threshold {b}: must be finite.")
    if not (config.beta > 0 and math.isfinite(config.beta)):
        raise UserError(f"--beta {config.beta}: must be above 0 and finite.")
    if config.draws < 40:
        raise UserError(f"--draws {config.draws}: a 95 % interval needs at least 40.")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must lie between 0 and {2**63 - 1}.")
    named = [*config.utility, *config.cost]
    for name, count in Counter(named).items():
        if count > 1:
            raise UserError(f"--utility and --cost: two constraints are named {name}; name each column once.")
        if name in ("prompt", "response", "reward"):
            raise UserError(f"--utility or --cost {name}: that column has its own meaning; name another one.")
    out = _folder(file, config)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: that is a file; name a folder.")
    for name in ("dual.json", "dual.png"):
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {out / name} is a folder; name another one.")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--out {out}: no folder can be made in {above}; name another one.")
    if config.export_pairs:
        target = Path(config.export_pairs)
        if target.suffix != ".jsonl":
            raise UserError(f"--export-pairs {target}: must end in .jsonl.")
        if target.resolve() == Path(file).resolve():
            raise UserError(f"--export-pairs {target}: that is the scores file; name another one.")
        if target.is_dir():
            raise UserError(f"--export-pairs {target}: that is a folder; name a file.")
        if not target.parent.is_dir():
            raise UserError(f"--export-pairs {target}: the folder {target.parent} does not exist; make it first.")
        if not os.access(target.parent, os.W_OK):
            raise UserError(f"--export-pairs {target}: no file can be made in {target.parent}; name another folder.")


def _folder(file: str, config: DualConfig) -> Path:
    return Path(config.out or f"{Path(file).stem}-dual")


def read_scores(file: str, utility: tuple[str, ...], cost: tuple[str, ...], *, texts: bool) -> Table:
    """The table of a scores file. `texts` asks for prompts and responses as text.

    Raises: UserError naming the file and line of a missing column, a value that is no finite number, or a prompt whose number of
    responses differs.
    """
    rows = data.read_file(file, SUFFIXES)
    if not rows:
        raise UserError(f"{file}: no rows in it; give one row per response.")
    if not utility and not cost:
        utility = _further_columns(*rows[0])
    names = [*utility, *cost]
    grouped: dict[str | int, list[tuple[str, dict]]] = {}
    for place, row in rows:
        prompt = _cell(row, "prompt", place)
        if not isinstance(prompt, str | int) or (texts and not isinstance(prompt, str)):
            wanted = "text" if texts else "text or a whole number"
            raise UserError(f"{place}: column 'prompt' holds a {type(prompt).__name__}; give {wanted}.")
        grouped.setdefault(prompt, []).append((place, row))

    counts = Counter(len(group) for group in grouped.values())
    G, alike = counts.most_common(1)[0]
    for prompt, group in grouped.items():
        if len(group) != G:
            raise UserError(
                f"{group[0][0]}: prompt {str(prompt)[:60]!r} has {len(group)} response(s), but {alike} prompt(s) have {G}; give all the "
                "same number."
            )
    if G < 2:
        raise UserError(f"{file}: one response per prompt; the dual weighs a prompt's responses against each other, so give at least 2.")
    if len(grouped) < 2:
        raise UserError(f"{file}: one prompt; an interval over prompts needs at least 2.")

    def column(name: str) -> Tensor:
        values = [[_number(row, name, place) for place, row in group] for group in grouped.values()]
        return torch.tensor(values, dtype=torch.float64)

    def response(place: str, row: dict) -> str:
        text = _cell(row, "response", place)
        if not isinstance(text, str):
            raise UserError(f"{place}: column 'response' holds a {type(text).__name__}; give text.")
        return text

    columns = [column(name) for name in utility] + [utility_of_cost(column(name)) for name in cost]
    return Table(
        prompts=list(grouped),
        responses=[[response(*pair) for pair in group] for group in grouped.values()] if texts else None,
        reward_PG=column("reward"),
        utility_PGJ=torch.stack(columns, dim=2),
        names=names,
    )


def _further_columns(place: str, row: dict) -> tuple[str, ...]:
    """The columns with numbers beside prompt, response and reward."""
    further = tuple(name for name, value in row.items() if name not in ("prompt", "response", "reward") and isinstance(value, int | float))
    if not further:
        raise UserError(f"{place}: no column of a utility or cost; columns found: {_list(row)}.")
    for name in further:
        if "cost" in name.lower():
            raise UserError(f"{place}: column {name!r} may be a cost; write --cost {name}, or --utility {name} if larger is better.")
    return further


def _cell(row: dict, name: str, place: str) -> object:
    if name not in row:
        raise UserError(f"{place}: no column {name!r}; columns found: {_list(row)}.")
    return row[name]


def _number(row: dict, name: str, place: str) -> float:
    value = _cell(row, name, place)
    if not isinstance(value, int | float):
        raise UserError(f"{place}: column {name!r} holds {str(value)[:60]!r}; give a number.")
    if isinstance(value, int) and abs(value) > 2**1000 or not math.isfinite(value):
        raise UserError(f"{place}: column {name!r} is {str(value)[:20]}; it must be finite: repair the score, or drop the prompt.")
    return float(value)


def _list(names) -> str:
    return ", ".join(map(str, names)) or "none"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Solutions along K thresholds, and the bootstrap's interval of lambda there (of one constraint only)."""

    x_K: np.ndarray  # the threshold of one constraint, or the common factor of several
    lam_KJ: np.ndarray
    gain_K: np.ndarray  # predicted improvement of the reward
    gain_se_K: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What is printed, drawn and written, in the units asked for."""

    file: str
    config: DualConfig
    table: Table
    units: list[float]  # of the reward and each utility, in the file's
    reward_PG: Tensor
    utility_PGJ: Tensor
    mean_J: Tensor
    b_J: Tensor  # required improvements
    solution: dual.Solution
    interval: dual.Interval
    bootstrap: tuple[Tensor, Tensor]  # low, high, each [J]
    lost: int  # bootstrap samples that do not support the thresholds
    gain_P: Tensor  # predicted improvement of the reward
    improvement_PJ: Tensor
    gain_at_zero: float  # the same at lambda 0
    at_zero_J: Tensor
    alone_J: Tensor  # largest improvements that are supported
    multiple: float  # of the required improvements, supported together
    warnings: list[str]

    @property
    def unit(self) -> str:
        return "units of the file" if self.config.raw else "within-prompt sd"

    @property
    def shift_J(self) -> Tensor:
        """From an improvement to a threshold."""
        return self.mean_J if self.config.absolute else torch.zeros_like(self.mean_J)


def run(file: str, config: DualConfig) -> None:
    """Solve, print, and write dual.json, dual.png and the pairs.

    Raises: UserError; dual.Infeasible (one too) with the largest thresholds that are supported.
    """
    table = read_scores(file, config.utility, config.cost, texts=bool(config.export_pairs))
    found = analyse(file, table, config)
    out = _folder(file, config)
    out.mkdir(parents=True, exist_ok=True)
    show = Display()
    print_analysis(found, show)
    curve = trace(found)
    write_whole(out / "dual.json", (json.dumps(as_dict(found, curve), indent=2, allow_nan=False) + "\n").encode())
    write_whole(out / "dual.png", picture(found, curve))
    show.line(f"wrote {out / 'dual.json'} and {out / 'dual.png'}")
    if config.export_pairs:
        rows, alike = preference_pairs(table, found.reward_PG + found.utility_PGJ @ found.solution.lam, config.seed)
        write_whole(Path(config.export_pairs), "".join(json.dumps(row) + "\n" for row in rows).encode())
        left_out = f", {alike} prompt(s) left out, as their best and worst response are alike" if alike else ""
        show.line(f"wrote {config.export_pairs}: {len(rows)} pairs{left_out}")


def analyse(file: str, table: Table, config: DualConfig) -> Analysis:
    """Solve the dual and measure its uncertainty.

    Raises: UserError for a constant column or thresholds that do not match the columns; dual.Infeasible.
    """
    J = len(table.names)
    if len(config.threshold) != J:
        raise UserError(
            f"--threshold {' '.join(map(str, config.threshold))}: {len(config.threshold)} value(s) for {J} constraint(s) "
            f"({_list(table.names)}); give one per constraint, or name the columns meant with --utility and --cost."
        )
    columns = {"reward": table.reward_PG, **dict(zip(table.names, table.utility_PGJ.unbind(2), strict=True))}
    deviations = [dual.within_deviation(column, f"{file}: column {name!r}") for name, column in columns.items()]
    units = [1.0] * (1 + J) if config.raw else deviations
    reward, utility = table.reward_PG / units[0], table.utility_PGJ / torch.tensor(units[1:], dtype=torch.float64)
    threshold, mean = torch.tensor(config.threshold, dtype=torch.float64), utility.mean((0, 1))
    problem = {"reward_PG": reward, "utility_PGJ": utility, "threshold_J": threshold, "beta": config.beta, "absolute": config.absolute}
    solution = dual.solve(**problem)
    draws = dual.bootstrap(**problem, draws=config.draws, seed=config.seed, start_J=solution.lam)
    gain_P, improvement_PJ = dual.tilted_improvement(reward, utility, solution.lam, config.beta)
    gain_at_zero, at_zero = dual.tilted_improvement(reward, utility, torch.zeros(J), config.beta)
    lost = int(draws[:, 0].isinf().sum())
    warnings = []
    if warning := dual.ess_warning(solution.ess, reward.shape[1]):
        warnings.append(warning + dual.half_sample(**problem, lam_J=solution.lam, seed=config.seed))
    if lost:
        warnings.append(f"{lost} of {config.draws} bootstrap samples do not support the thresholds; they count as infinite multipliers.")
    return Analysis(
        file=file, config=config, table=table, units=units, reward_PG=reward, utility_PGJ=utility, mean_J=mean,
        b_J=threshold - mean if config.absolute else threshold, solution=solution, interval=dual.lam_interval(**problem, solution=solution),
        bootstrap=dual.percentiles(draws), lost=lost, gain_P=gain_P, improvement_PJ=improvement_PJ,
        gain_at_zero=float(gain_at_zero.mean()), at_zero_J=at_zero.mean(0), alone_J=dual.largest_threshold(utility),
        multiple=dual.largest_multiple(utility, threshold, absolute=config.absolute), warnings=warnings,
    )  # fmt: skip


def print_analysis(found: Analysis, show: Display) -> None:
    """The tables and sentences."""
    config, solution, names = found.config, found.solution, found.table.names
    P, G, J = found.utility_PGJ.shape
    roles = [f"{name} is a {'cost, negated' if name in config.cost else 'utility, larger is better'}" for name in names]
    show.line(f"{found.file}: {P} prompts x {G} responses; {'; '.join(roles)}")
    sizes = ", ".join(f"{name} {unit:.4g}" for name, unit in zip(["reward", *names], found.units, strict=True))
    if config.raw:
        show.line(f"units: those of the file; beta {config.beta:g}, b and lambda are in them")
    else:
        show.line(
            f"units: within-prompt standard deviations, which are {sizes} of the file's; beta {config.beta:g}, b and lambda are in them"
        )
    word = "level" if config.absolute else "b"
    low, high = found.bootstrap
    se = dual.standard_error(found.improvement_PJ)
    for j, name in enumerate(names):
        delta = f"{_interval(found.interval.low[j], found.interval.high[j])} by the delta method"
        if found.interval.se[j].isinf():
            delta = "not identified by the delta method (another constraint asks for the same)"
        show.line(
            f"constraint {name}: {word} {config.threshold[j]:.3f}, lambda {solution.lam[j]:.4f}, 95 % over prompts {delta}, "
            f"{_interval(low[j], high[j])} by the bootstrap"
        )
        show.line(
            f"  predicted improvement {solution.predicted_improvement[j]:+.3f} +- {se[j]:.3f} (at lambda 0: {found.at_zero_J[j]:+.3f}); "
            f"largest supported {word} {found.alone_J[j] + found.shift_J[j]:.3f}{' alone' if J > 1 else ''}"
        )
    if J > 1 and found.multiple == math.inf:
        show.line("any multiple of the required improvements is supported, as none is above 0")
    elif J > 1:
        together = _numbers(found.b_J * found.multiple + found.shift_J)
        show.line(f"largest supported together: {found.multiple:.3f} x the required improvements, {word} = {together}")
    gain, gain_se = float(found.gain_P.mean()), float(dual.standard_error(found.gain_P))
    show.line(f"reward: predicted improvement {gain:+.3f} +- {gain_se:.3f} (at lambda 0: {found.gain_at_zero:+.3f})")
    show.line(
        f"effective sample size {solution.ess.mean():.1f} of {G}; value of the dual {solution.value:.6g}; KKT residual {solution.kkt:.1e}"
    )
    for warning in found.warnings:
        show.warn(warning)


def as_dict(found: Analysis, curve: Curve) -> dict:
    """The content of dual.json; null stands for what is unbounded, lam_se null for a multiplier that the scores do not identify."""
    config, solution = found.config, found.solution
    se = dual.standard_error(found.improvement_PJ)
    constraints = [
        {
            "name": name, "negated": name in config.cost, "unit": found.units[1 + j], "threshold": config.threshold[j],
            "b": float(found.b_J[j]), "lam": float(solution.lam[j]), "lam_se": _finite(found.interval.se[j]),
            "lam_delta": [_finite(found.interval.low[j]), _finite(found.interval.high[j])],
            "lam_bootstrap": [_finite(bound[j]) for bound in found.bootstrap], "slack": float(solution.gradient[j]),
            "improvement": float(solution.predicted_improvement[j]), "improvement_se": float(se[j]),
            "improvement_at_zero": float(found.at_zero_J[j]), "largest_improvement": float(found.alone_J[j]),
        }
        for j, name in enumerate(found.table.names)
    ]  # fmt: skip
    P, G = found.reward_PG.shape
    return {
        "scores": found.file, "prompts": P, "responses": G, "beta": config.beta, "absolute": config.absolute, "raw": config.raw,
        "draws": config.draws, "seed": config.seed, "reward_unit": found.units[0], "constraints": constraints,
        "largest_multiple": _finite(found.multiple), "reward_improvement": float(found.gain_P.mean()),
        "reward_improvement_se": float(dual.standard_error(found.gain_P)), "reward_improvement_at_zero": found.gain_at_zero,
        "ess": float(solution.ess.mean()), "value": solution.value, "kkt": solution.kkt, "unsupported_draws": found.lost,
        "warnings": found.warnings,
        "curve": {"x": curve.x_K.tolist(), "lam": curve.lam_KJ.tolist(), "reward_improvement": curve.gain_K.tolist()},
    }  # fmt: skip


def preference_pairs(table: Table, score_PG: Tensor, seed: int) -> tuple[list[dict], int]:
    """(rows, number of prompts left out): the responses with the highest and the lowest s = r + lambda . g of each prompt, the chosen one
    drawn by Bradley-Terry: P(highest) = sigmoid(s_high - s_low), as in arXiv 2505.19387, Algorithm 2.

    DPO with the same beta then ends at the tilt exp(s / beta) of the reference. Were the highest always chosen, its loss would have no
    finite minimiser. A row has the text columns prompt, chosen and rejected, as TRL's DPOTrainer reads them (OpenRLHF with --prompt_key
    prompt), and score_chosen and score_rejected. Prompts whose two responses have one score or one text carry no preference.
    """
    rows = []
    drawn_P = torch.rand(len(score_PG), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    for p, order in enumerate(score_PG.argsort(dim=1, stable=True).tolist()):
        low, high = order[0], order[-1]
        rise = float(score_PG[p, high] - score_PG[p, low])
        if rise > 0 and table.responses[p][high] != table.responses[p][low]:
            chosen, rejected = (high, low) if drawn_P[p] < 1 / (1 + math.exp(-rise)) else (low, high)
            rows.append({
                "prompt": table.prompts[p], "chosen": table.responses[p][chosen], "rejected": table.responses[p][rejected],
                "score_chosen": float(score_PG[p, chosen]), "score_rejected": float(score_PG[p, rejected]),
            })  # fmt: skip
    return rows, len(table.prompts) - len(rows)


def trace(found: Analysis, points: int = 61) -> Curve:
    """The dual's solutions as the thresholds rise: one constraint from its improvement at lambda 0 to near the largest supported one,
    several by a common factor from 0 on."""
    config, b = found.config, found.b_J
    J = len(b)
    if J == 1:
        low, own, top = min(float(found.at_zero_J), float(b)), float(b), float(found.alone_J)
    else:
        low, own, top = 0.0, 1.0, min(found.multiple, 3.0)
    x_K = np.unique([*np.linspace(low, max(low + 0.95 * (top - low), own), points), own])
    lam, lams, gains = None, [], []
    for x in x_K:
        try:
            lam = dual.solve(found.reward_PG, found.utility_PGJ, b * x if J > 1 else [x], config.beta, start_J=lam).lam
        except UserError:  # so near to the limit that lambda has no accurate value
            break
        lams.append(lam.numpy())
        gains.append(dual.tilted_improvement(found.reward_PG, found.utility_PGJ, lam, config.beta)[0])
    x_K = x_K[: len(lams)]
    return Curve(
        x_K=x_K + float(found.shift_J) if J == 1 else x_K,
        lam_KJ=np.stack(lams),
        gain_K=np.array([float(gain_P.mean()) for gain_P in gains]),
        gain_se_K=np.array([float(dual.standard_error(gain_P)) for gain_P in gains]),
        band=_band(found, x_K + float(found.shift_J), np.stack(lams).max()) if J == 1 else None,
    )


def _band(found: Analysis, x_K: np.ndarray, lam_max: float) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap's 95 % interval of one multiplier at all thresholds: a sample's improvement at lambda is a mean over its prompts, so
    a table of every prompt's improvement serves all samples, and lambda is read off backwards."""
    P = len(found.reward_PG)
    grid = np.linspace(0, 3 * max(lam_max, 1e-3), 150)
    level_P = found.utility_PGJ[..., 0].mean(1) if found.config.absolute else torch.zeros(P, dtype=torch.float64)
    table_LP = torch.stack(
        [
            dual.tilted_improvement(found.reward_PG, found.utility_PGJ, torch.tensor([lam]), found.config.beta)[1][:, 0] + level_P
            for lam in grid
        ]
    )
    generator = torch.Generator().manual_seed(found.config.seed)
    draws = []
    for _ in range(found.config.draws):
        reached_L = table_LP[:, torch.randint(P, (P,), generator=generator)].mean(1).numpy()
        draws.append(np.interp(x_K, reached_L, grid, left=0.0, right=math.inf))
    low, high = dual.percentiles(np.stack(draws))
    return low.numpy(), high.numpy()


def picture(found: Analysis, curve: Curve) -> bytes:
    """The PNG: multipliers and the predicted improvement of the reward along the thresholds, the chosen ones marked."""

    def draw() -> Figure:
        figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        left, right = figure.subplots(1, 2)
        _lambda_panel(left, found, curve)
        _reward_panel(right, found, curve)
        P, G = found.reward_PG.shape
        figure.suptitle(f"Dual of {Path(found.file).name[-60:]}: {P} prompts x {G} responses, beta {found.config.beta:g}", color=INK)
        frame(left, "Multipliers")
        frame(right, "Price in reward")
        return figure

    return png(draw)


def _chosen(found: Analysis) -> float:
    """Where the given thresholds lie on the horizontal axis."""
    return found.config.threshold[0] if len(found.b_J) == 1 else 1.0


def _lambda_panel(axis: Axes, found: Analysis, curve: Curve) -> None:
    x, low, high = _chosen(found), *found.bootstrap
    top = 1.15 * max(float(curve.lam_KJ.max()), 1e-3)
    if curve.band is not None:
        axis.fill_between(
            curve.x_K, curve.band[0], np.minimum(curve.band[1], 2 * top), color=COLOURS[0], alpha=0.2, linewidth=0, label="95 %, bootstrap"
        )
    for j, name in enumerate(found.table.names):
        colour = COLOURS[j % len(COLOURS)]
        lam = float(found.solution.lam[j])
        axis.plot(curve.x_K, curve.lam_KJ[:, j], color=colour, linewidth=2, label=f"lambda of {name[:30]}")
        bars = [[lam - min(float(low[j]), lam)], [min(max(float(high[j]), lam), 2 * top) - lam]]
        axis.errorbar(x, lam, yerr=bars, fmt="o", color=colour, markersize=6, capsize=3, label=f"here: {lam:.3f}, 95 % bootstrap")
    axis.axvline(x, color=INK, linewidth=1, linestyle=":")
    axis.set_ylim(-0.03 * top, top)
    per = "reward per utility, units of the file" if found.config.raw else "reward sd per utility sd"
    axis.set(xlabel=_x_label(found), ylabel=f"multiplier lambda\n({per})")


def _reward_panel(axis: Axes, found: Analysis, curve: Curve) -> None:
    x, gain, se = _chosen(found), float(found.gain_P.mean()), float(dual.standard_error(found.gain_P))
    axis.fill_between(
        curve.x_K, curve.gain_K - 1.96 * curve.gain_se_K, curve.gain_K + 1.96 * curve.gain_se_K, color=POLICY, alpha=0.2, linewidth=0,
        label="\u00b11.96 se over prompts",
    )  # fmt: skip
    axis.plot(curve.x_K, curve.gain_K, color=POLICY, linewidth=2, label="reward at the solution")
    axis.plot(x, gain, "o", color=POLICY, markersize=6, label=f"here: {gain:+.3f} \u00b1 {1.96 * se:.3f}")
    axis.axhline(found.gain_at_zero, color=REFERENCE, linewidth=1.3, linestyle="--", label="without constraints (lambda 0)")
    axis.axhline(0, color=REFERENCE, linewidth=1, linestyle=":", label="reference")
    axis.axvline(x, color=INK, linewidth=1, linestyle=":")
    axis.margins(y=0.1)
    axis.set(xlabel=_x_label(found), ylabel=f"predicted improvement of the reward\n({found.unit})")


def _x_label(found: Analysis) -> str:
    if len(found.b_J) > 1:
        return "common factor of all required improvements\n(1: as given)"
    what = "required level" if found.config.absolute else "required improvement b"
    name = ("minus " if found.config.cost else "") + found.table.names[0][:40]
    return f"{what} of {name}\n({found.unit}; largest supported {found.alone_J[0] + found.shift_J[0]:.3g})"


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())


def _interval(low: Tensor, high: Tensor) -> str:
    return f"[{float(low):.3f}, {'unbounded' if high.isinf() else f'{float(high):.3f}'}]"


def _finite(value: Tensor | float) -> float | None:
    return float(value) if math.isfinite(value) else None
