"""TODO"""

import json
import math
import sys
from pathlib import Path

from torch import Tensor

from engine import dual
from engine.config.flags import parse_flags
from engine.dual.analysis import Analysis, analyse, as_dict, trace
from engine.dual.config import DualConfig, check, output_folder
from engine.dual.picture import picture
from engine.dual.scores_file import preference_pairs, read_scores
from engine.dual.uncertainty import range_text
from engine.errors import UserError
from engine.files import write_whole
from engine.run.display import Display

USAGE = """usage: python -m engine.dual SCORES.(jsonl|parquet) --threshold B [B ...] [flags]

SCORES has one row per response: prompt (text or a whole number), reward, one column per utility or cost, and response where pairs are
exported. Thresholds stand in the order of the --utility names, then the --cost names.
"""


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


def run(file: str, config: DualConfig) -> None:
    """Solve, print, and write dual.json, dual.png and the pairs.

    Raises: UserError; dual.Infeasible (one too) with the largest thresholds that are supported.
    """
    table = read_scores(file, config.utility, config.cost, texts=bool(config.export_pairs))
    found = analyse(file, table, config)
    out = output_folder(file, config)
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
        delta = f"{range_text(found.interval.low[j], found.interval.high[j])} by the delta method"
        if found.interval.se[j].isinf():
            delta = "not identified by the delta method (another constraint asks for the same)"
        show.line(
            f"constraint {name}: {word} {config.threshold[j]:.3f}, lambda {solution.lam[j]:.4f}, 95 % over prompts {delta}, "
            f"{range_text(low[j], high[j])} by the bootstrap"
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


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())


if __name__ == "__main__":
    sys.exit(main())
