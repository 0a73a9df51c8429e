"""Asks what one-shot multipliers depend on, whether their predictions come true, and how well scores are
calibrated as preferences.

`python -m bench.figures SAMPLES [RUN ...] [--preference RUN]` computes it from stored scores alone;
nothing is sampled. SAMPLES is a run folder with reference samples (any run, or a sweep's samples-seedSEED);
the predictions for each RUN come from its samples. Writes docs/figures.md, figures.json
and two or three pictures.

1. lambda* of random subsets of the prompts, and of the responses, at the run's thresholds: its spread, the
   delta-method interval (arXiv 2405.19544 has no interval), and the bias of few responses.
2. Predicted improvement at lambda, by re-weighting reference samples, against the improvement measured on
   samples of the policy that was trained at it (arXiv 2405.19544, Table 4).
3. Of a run on preference scores (`pecan`, or `caid --scores preference`): the probability that one response
   is preferred to another according to log-ratios of aligned policies and to model scores, against the
   probability of the labels, or according to an audit (arXiv 2405.19544, Figure 6). Labels of a file are not
   known here: then the run's scorers are one more judge.
"""

import argparse
import sys
from pathlib import Path

from bench.figures.calibration import draw_calibration, judge_preferences
from bench.figures.page import page_text
from bench.figures.predictions import draw_realised, realised
from bench.figures.stored import read_stored
from bench.figures.subsets import draw_subsets, lam_of_subsets
from engine.command import run_command
from engine.files import write_json, write_whole
from engine.report.drawing import png

DOCS = Path(__file__).parent.parent.parent / "docs"


def main() -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", type=Path, help="run folder with reference samples")
    compared = "run folders whose policies are compared with the predictions"
    parser.add_argument("runs", type=Path, nargs="*", help=compared)
    shown = "run folder on preference scores, whose calibration is shown"
    parser.add_argument("--preference", type=Path, help=shown)
    given = parser.parse_args()
    return run_command(lambda _, standing: _figures(given), None)


def _figures(given: argparse.Namespace) -> None:
    known = {folder: read_stored(folder) for folder in dict.fromkeys([given.samples, *given.runs])}
    samples, runs = known[given.samples], [known[run] for run in given.runs]
    calibrated = [] if given.preference is None else judge_preferences(given.preference)
    by_size = lam_of_subsets(samples.reward_PG, samples.utility_PGJ, samples.aim_J, samples.beta)
    rows = [row for run in given.runs for row in realised(run, known[run])]
    write_whole(DOCS / "figures-subsets.png", png(lambda: draw_subsets(by_size)))
    if rows:
        write_whole(DOCS / "figures-realised.png", png(lambda: draw_realised(rows)))
    if calibrated:
        write_whole(DOCS / "figures-calibration.png", png(lambda: draw_calibration(calibrated)))
    contents = {"subsets": by_size, "realised": rows, "calibration": calibrated}
    write_json(DOCS / "figures.json", contents)
    text = page_text(_command(given), samples, by_size, rows, runs, calibrated)
    write_whole(DOCS / "figures.md", text.encode())
    print(f"written: {DOCS / 'figures.md'}")


def _command(given: argparse.Namespace) -> str:
    """Returns the command, with the last name only of absolute paths."""
    preference = ["--preference", given.preference] if given.preference else []
    words = [given.samples, *given.runs, *preference]
    shown = (x.name if isinstance(x, Path) and x.is_absolute() else str(x) for x in words)
    return " ".join(["python -m bench.figures", *shown])


if __name__ == "__main__":
    sys.exit(main())
