"""Does CAID's last policy land nearer to the threshold than MoCAN's? The study of docs/study.md.

    python -m bench.study --seeds 0 1    runs two seeds (resumable; hours), keeps their table, writes the page
    python -m bench.study                writes the page alone, from the tables that are kept

The question, fixed before any run: |improvement - b| of CAID's last iterate against that of MoCAN's policy,
paired by seed. The unit is the seed, which redraws reference samples, pairs, adapter and order; all
thresholds of a seed stay together in the bootstrap. With `--margin 0` the dual aims at b itself, as in the
papers. Training prompts, the prompts that settings were chosen on and the test prompts are disjoint. A GPU
version is the same command with another page and other flags behind --, for example
`--docs docs/gpu -- --model FOLDER --device cuda`.

Controls, at one threshold, are further parts. Flags that the parts of a page do not share
are added to a method's name:

    --algorithms caid:dual_rule=bisection        lambda by bisection, everything else as CAID
    --algorithms mocan -- --n-responses 10       MoCAN with as many sampled tokens as CAID takes in all

MoCAN takes as many policy steps as CAID as it is, every step on fresh prompts,
and the regression form draws no labels. A part with other costs has a table of its own,
for example `--thresholds 0.2,0.4 -- --cost harm harm-audit --audit`: a bare --audit leaves audits out,
as the default one, harm-audit, may not be a cost as well.
"""

import argparse
import sys
from pathlib import Path

from bench.study.answers import answer, paired
from bench.study.arms import arm, complete
from bench.study.page import page_text
from bench.study.parts import Asked, part_name, read_parts, run_part
from bench.study.picture import picture
from bench.study.plan import CAID, DOCS, MOCAN, OTHERS, THRESHOLDS
from engine.command import Standing, run_command
from engine.files import write_whole


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    given = _parser().parse_args(words)
    return run_command(lambda _, standing: _study(given, standing), words)


def _study(given: argparse.Namespace, standing: Standing) -> int:
    docs = given.docs
    if given.seeds:
        out = given.out / part_name(given.algorithms, given.thresholds, given.seeds, given.flags)
        standing.again = lambda: f"start the same command again, which goes on in {out}"
        asked = Asked(given.seeds, tuple(given.algorithms), tuple(given.thresholds), tuple(given.flags))
        run_part(asked, out, docs)
    rows, settings, shared = read_parts(docs / "study")
    if not rows:
        print(f"{docs / 'study'}: it holds no part yet; run python -m bench.study --seeds 0", file=sys.stderr)
        return 1
    seeds = complete(rows)
    write_whole(docs / "study.png", picture(rows, seeds))
    write_whole(docs / "study.md", page_text(rows, settings, shared, docs).encode())
    result = {"seeds": 0}
    if seeds:
        result = paired(arm(rows, CAID, seeds), arm(rows, MOCAN, seeds))
    print(f"written: {docs / 'study.md'}; {answer(result)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[], help="seeds to run; none writes the page alone")
    methods = f"the question needs {CAID} and {MOCAN}; others: {', '.join(OTHERS)}"
    add("--algorithms", nargs="+", default=[CAID, MOCAN], help=methods)
    thresholds = "values of b, in within-prompt standard deviations"
    add("--thresholds", nargs="+", default=list(map(str, THRESHOLDS)), help=thresholds)
    runs = "folder of the runs; each part has a folder in it"
    add("--out", type=Path, default=Path("runs/study"), help=runs)
    page = "folder of the page study.md and of its tables, study/part-*.csv"
    add("--docs", type=Path, default=DOCS, help=page)
    add("flags", nargs="*", help="flags of engine.train for all runs, behind --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
