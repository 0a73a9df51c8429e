"""The page docs/figures.md."""

from bench.figures.calibration import BINS
from bench.figures.stored import Stored
from bench.figures.subsets import DRAWS


def page_text(
    command: str,
    samples: Stored,
    by_size: dict[str, list],
    rows: list[dict],
    runs: list[Stored],
    calibrated: list[dict],
) -> str:
    """Returns the page, with the parts on runs and on calibration where there are any."""
    lines = [*_head(command, samples), *_subsets(by_size)]
    if rows:
        lines += _realised(rows, runs)
    if calibrated:
        lines += _calibrated(calibrated)
    return "\n".join(lines) + "\n"


def _head(command: str, samples: Stored) -> list[str]:
    P, G = samples.reward_PG.shape
    return [
        "# What one-shot multipliers depend on, and whether their predictions come true",
        "",
        f"From stored scores, nothing sampled anew: {P} prompts x {G} responses of the reference. "
        "Improvements and lambda are in within-prompt standard deviations.",
        "",
        f"    {command}",
        "",
        f"Samples: {samples.says}.",
    ]


def _subsets(by_size: dict[str, list]) -> list[str]:
    lines = [
        "",
        "![One-shot lambda of subsets](figures-subsets.png)",
        "",
        "| of | number | mean lambda | 95 % of subsets | half width of the delta-method interval | effective "
        "sample size | not supported |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("prompts", "responses"):
        for row in by_size[kind]:
            mean, half = (
                ", ".join(f"{x:.3f}" for x in row[k]) if row[k] else "unsupported" for k in ("mean", "half")
            )
            ends = ", ".join(
                f"[{_number(a)}, {_number(b)}]" for a, b in zip(row["low"], row["high"], strict=True)
            )
            ess = "unsupported" if row["ess"] is None else f"{row['ess']:.1f}"
            lacking = f"{row['unsupported']} of {DRAWS}"
            lines.append(f"| {kind} | {row['n']} | {mean} | {ends} | {half} | {ess} | {lacking} |")
    lam = ", ".join(f"{x:.3f}" for x in by_size["full"])
    return [
        *lines,
        "",
        f"All samples: lambda {lam}. Subsets of the prompts are drawn with replacement; their "
        "spread is what the interval should cover; from 8 responses on it also holds what is not known of "
        "their bias. Fewer responses make lambda larger on average: the best "
        "of few is not as good, so more weight is needed for the same predicted improvement.",
    ]


def _number(x: float | None) -> str:
    return "unsupported" if x is None else f"{x:.2f}"


def _realised(rows: list[dict], runs: list[Stored]) -> list[str]:
    lines = [
        "",
        *(f"- Run {run.says}" for run in runs),
        "",
        "![Predicted against measured improvements](figures-realised.png)",
        "",
        "| run | policy | lambda | predicted | measured | reward predicted | reward measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lam, predicted = (", ".join(f"{x:.2f}" for x in row[k]) for k in ("lam", "predicted"))
        measured = ", ".join(_pm(x, s) for x, s in zip(row["measured"], row["se"], strict=True))
        reward = f"{row['predicted reward']:+.2f} | {_pm(row['reward'], row['reward se'])}"
        lines.append(f"| {row['run']} | {row['what']} | {lam} | {predicted} | {measured} | {reward} |")
    return [
        *lines,
        "",
        "The prediction re-weights the reference's samples with the tilt; a trained policy falls short of it "
        "as far as its few steps and its class do. Policies measured in an iteration are judged on training "
        "prompts outside its pairs, the last one on held-out ones.",
    ]


def _pm(mean: float, se: float) -> str:
    return f"{mean:+.2f} \u00b1 {1.96 * se:.2f}"


def _calibrated(calibrated: list[dict]) -> list[str]:
    return [
        "",
        "![Calibration of scores as preferences](figures-calibration.png)",
        "",
        "| truth | prediction | mean distance from calibration | same preference |",
        "|---|---|---|---|",
        *(
            f"| {r['truth']} | {r['what']} | {r['error']:.3f} | {100 * r['agreement']:.0f} % |"
            for r in calibrated
        ),
        "",
        f"All pairs of a prompt's responses, in {BINS} bins of equally many. Labels are Bradley-Terry draws "
        "from the run's scorers, of one pair of each prompt that the alignment saw; the truth is their "
        "probability. A run aligned to the labels of a file, which are not here, is set against its scorers. "
        "Where an audit judges, neither score was fitted to it.",
    ]
