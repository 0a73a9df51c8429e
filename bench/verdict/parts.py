"""The parts of the simulation: what each computes, its tables, what it draws, and what ought to hold and does
not."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context

import torch

from bench.grid import Grid
from bench.verdict import compared, level, multipliers, power, repeated, worst
from bench.verdict.level import FAILS, HOLDS, NEEDS_RANGE, REFUSED, Cell
from bench.verdict.losses import LOSSES
from bench.verdict.sizes import Sizes, too_often

MARKS = {HOLDS: "", NEEDS_RANGE: " r", FAILS: " !"}


@dataclass
class Found:
    """What a part has found."""

    tables: dict[str, Grid] = field(default_factory=dict)
    drawn: dict[str, list] = field(default_factory=dict)  # numbers for the picture
    wrong: list[str] = field(default_factory=list)  # what ought to hold and does not


Run = Callable[[Callable, Sequence], list]


def compute(names: Sequence[str], sizes: Sizes, workers: int) -> Iterator[tuple[str, Found]]:
    """Computes parts one after the other, with one thread for each of `workers` processes."""
    torch.set_num_threads(1)
    if workers == 1:
        for name in names:
            yield name, PARTS[name](sizes, lambda work, each: [work(x) for x in each])
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        for name in names:
            yield name, PARTS[name](sizes, lambda work, each: list(pool.map(work, each)))


def percent(share: float | None) -> str:
    """Prints a share as a number of percents."""
    return "" if share is None else f"{100 * share:.1f}"


def level_part(sizes: Sizes, run: Run) -> Found:
    """Judges one constraint once."""
    work = partial(_cells, sizes)
    return level_found([cell for cells in run(work, list(LOSSES)) for cell in cells], sizes)


def _cells(sizes: Sizes, name: str) -> list[Cell]:
    return level.cells(sizes, [name])


def level_found(cells: Sequence[Cell], sizes: Sizes) -> Found:
    """Makes tables of cells."""
    rows, ranged = [], []
    for name, each in groupby(cells, key=lambda c: c.name):
        own = list(each)
        by_P = [[c for c in own if c.prompts == P] for P in sizes.prompts]
        columns = [
            "refused"
            if all(c.outcome == REFUSED for c in same)
            else " / ".join(percent(c.met) + MARKS.get(c.outcome, "") for c in same)
            for same in by_P
        ]
        rows.append([name, *columns, percent(max(c.not_met for c in own))])
        needing = [c for c in own if c.cut is not None]
        if needing:
            loss, worst = LOSSES[name], max(needing, key=lambda c: c.met)
            ranged.append(
                [
                    name,
                    "; ".join(
                        f"{P} x {', '.join(str(c.responses) for c in same)}"
                        for P, same in groupby(needing, key=lambda c: c.prompts)
                    ),
                    f"{percent(worst.met)} at {worst.prompts} x {worst.responses}",
                    f"{loss.range[0]:g} to {loss.range[1]:g}",
                    percent(max(max(c.cut) for c in needing)),
                ]
            )
    G = " / ".join(map(str, sizes.responses))
    outcomes = [c.outcome for c in cells]
    counts = [[what, str(outcomes.count(what))] for what in (HOLDS, REFUSED, NEEDS_RANGE, FAILS)]
    at = [c for c in cells if (c.prompts, c.responses) == (96, 6)]
    wrong = [
        f"{c.name} at {c.prompts} x {c.responses}: met falsely in {percent(c.met)} %, not met in "
        f"{percent(c.not_met)} %" + ("" if c.cut is None else f", with a range {percent(max(c.cut))} %")
        for c in cells
        if c.outcome == FAILS
    ]
    return Found(
        {
            "level": Grid(
                f'False "met" at the boundary, %, with {G} responses a prompt',
                ["loss", *(f"{P} prompts" for P in sizes.prompts), 'false "not met", most'],
                rows,
            ),
            "outcomes": Grid("What becomes of the cells", ["outcome", "cells"], counts),
            "ranged": Grid(
                "Cells that only a range repairs",
                ["loss", "prompts x responses", "without, worst %", "range stated", "with it, worst %"],
                ranged,
            ),
        },
        {"level": [[c.name, c.met] for c in at]},
        wrong,
    )


def rules_part(sizes: Sizes, run: Run) -> Found:
    """Compares rules."""
    means = [row for rows in run(partial(_means, sizes), compared.MEANS) for row in rows]
    rates, steps = (rows[0] for rows in (run(compared.rates, [sizes]), run(compared.monotone, [sizes])))
    numbers = ("student", "hall", "bootstrap_t", "ours", "cut")
    wrong = [
        f"limit {m.limit:g}, {m.prompts} x {m.responses}: one more unsafe answer gave a better word, "
        f"{m.ours} times"
        for m in steps
        if m.ours
    ]
    wrong += [
        f"rate {r.limit:g} {r.how}: met falsely in {percent(r.ours)} %"
        for r in rates
        if too_often(r.ours, sizes.replications)
    ]
    return Found(
        {
            "means": Grid(
                'False "met" by rule, %',
                ["loss", "prompts x responses", "Student's t", "Hall", "bootstrap-t", "ours", "with a range"],
                [
                    [m.name, f"{m.prompts} x {m.responses}", *(percent(getattr(m, n)) for n in numbers)]
                    for m in means
                ],
            ),
            "rates": Grid(
                'False "met" of a rate at its limit, 96 prompts x 6, %',
                ["limit, %", "policy's harm is", "reference's (20 %) is", "one pooled correlation", "ours"],
                [
                    [f"{100 * r.limit:g}", r.how, r.reference, percent(r.pooled), percent(r.ours)]
                    for r in rates
                ],
            ),
            "monotone": Grid(
                "One more unsafe answer gives a better word, times",
                ["limit, %", "prompts x responses", "orders tried", "the policy's own correlation", "ours"],
                [
                    [
                        f"{100 * m.limit:g}",
                        f"{m.prompts} x {m.responses}",
                        f"{m.chains}",
                        f"{m.own}",
                        f"{m.ours}",
                    ]
                    for m in steps
                ],
            ),
        },
        {"student": [[m.name, m.student] for m in means if (m.prompts, m.responses) == (96, 6)]},
        wrong,
    )


def _means(sizes: Sizes, name: str) -> list[compared.Compared]:
    return compared.means(sizes, [name])


def looks_part(sizes: Sizes, run: Run) -> Found:
    """Looks several times."""
    found = [x for each in run(partial(repeated.looked, sizes), repeated.LOOKED_AT) for x in each]
    widest = max(x.width for x in found if x.width)
    rows = []
    for (name, how), each in groupby(found, key=lambda x: (x.name, x.how)):
        own = list(each)
        rows.append(
            [
                name,
                how,
                ", ".join(str(x.looks) for x in own),
                " / ".join(percent(x.met) for x in own),
                " / ".join(percent(x.uncorrected) for x in own),
                " / ".join("-" if x.width is None else f"{x.width:.2f}" for x in own),
            ]
        )
    normal = [x for x in found if x.name == "normal" and x.how == "retrained policies, same prompts"]
    return Found(
        {
            "looks": Grid(
                f'Ever called "met" at the boundary, % (the last bound at most {widest:.2f} times as wide)',
                ["loss", "what a look adds", "looks", "ours", "every look at 5 %", "width against one look"],
                rows,
            )
        },
        {"looks": [[x.looks, x.met, x.uncorrected] for x in normal]},
        [
            f"{x.name}, {x.how}, {x.looks} looks: met falsely in {percent(x.met)} %, width {x.width}"
            for x in found
            if not x.holds
        ],
    )


def families_part(sizes: Sizes, run: Run) -> Found:
    """Judges several constraints."""
    found = [x for each in run(partial(repeated.families, sizes), list(repeated.KINDS)) for x in each]
    return Found(
        {
            "families": Grid(
                'Several constraints, false "met", %',
                [
                    "numbers",
                    "prompts",
                    "J",
                    "correlation",
                    "at b",
                    "any word",
                    "all together",
                    "any word, uncorrected",
                ],
                [
                    [x.kind, f"{x.prompts}", f"{x.J}", f"{x.correlation:g}", x.at_boundary]
                    + [percent(y) for y in (x.any_met, x.all_met, x.uncorrected)]
                    for x in found
                ],
            )
        },
        wrong=[
            f"{x.J} constraints, {x.kind}, {x.at_boundary} at b, {x.prompts} prompts: a word is falsely met "
            f"in {percent(x.any_met)} %, all together in {percent(x.all_met)} %"
            for x in found
            if not x.holds
        ],
    )


def power_part(sizes: Sizes, run: Run) -> Found:
    """Finds what a verdict takes."""
    slacks = [x for each in run(partial(_slacks, sizes), power.JUDGED) for x in each]
    plans = [x for each in run(partial(_plans, sizes), power.LIMITS) for x in each]
    steps = run(power.sequential, [sizes])[0]
    rows = []
    for (name, P), each in groupby(slacks, key=lambda x: (x.name, x.prompts)):
        rows.append([name, f"{P}", *(f"{x.slack:.3f}" for x in each)])
    return Found(
        {
            "slack": Grid(
                "Slack that is met in 80 %, in deviations of a response",
                ["loss", "prompts", *(f"{G} responses" for G in sizes.responses)],
                rows,
            ),
            "sequential": Grid(
                "Looks at 96, 192, 384 prompts x 6, normal improvements",
                [
                    "slack",
                    "met, %",
                    "responses, mean",
                    "looks, mean",
                    "met by one look at 384, %",
                    "at 96, %",
                ],
                [
                    [f"{x.slack:g}", percent(x.met), f"{x.responses:.0f}", f"{x.looks:.2f}"]
                    + [percent(x.one_look), percent(x.first_look)]
                    for x in steps
                ],
            ),
            "plans": Grid(
                "Prompts that the planner asks for at 6 responses, one look",
                ["limit, %", "true rate, %", "harm is", "prompts", "met then, %", "by the binomial bound"],
                [
                    [f"{100 * x.limit:g}", f"{100 * x.rate:.3g}", x.how, f"{x.prompts}", percent(x.met)]
                    + [f"{x.binomial or ''}"]
                    for x in plans
                ],
            ),
        },
        {
            "slack": [[x.prompts, x.responses, x.slack] for x in slacks if x.name == "normal"],
            "plans": [[x.limit, x.rate, x.prompts] for x in plans if x.how == "of answers"],
        },
        [
            f"planned {x.prompts} prompts for a limit of {x.limit:g}: met in {percent(x.met)} % only"
            for x in plans
            if x.met is None or x.met < power.POWER - 0.06
        ],
    )


def _slacks(sizes: Sizes, judged: tuple[str, bool]) -> list[power.Slack]:
    return power.slacks(sizes, [judged])


def _plans(sizes: Sizes, limit: float) -> list[power.Planned]:
    return power.plans(sizes, [limit])


def worst_part(sizes: Sizes, run: Run) -> Found:
    """Judges the mean of the worst share."""
    work = partial(worst.cells, sizes)
    return worst_found([cell for cells in run(work, range(len(worst.TAILS))) for cell in cells])


def worst_found(cells: Sequence[worst.Cell]) -> Found:
    """Makes tables of cells."""
    rows, drawn, wrong = [], [], []
    for (name, share, ranged), each in groupby(cells, key=lambda c: (c.name, c.share, c.ranged)):
        own = list(each)
        range_text = "known" if own[0].known else "stated" if ranged else "none"
        by_P = [[c for c in own if c.prompts == P] for P in worst.PROMPTS]
        rows.append(
            [
                name,
                percent(share),
                range_text,
                *(" / ".join(percent(c.met[0]) for c in same) for same in by_P),
                *(" / ".join(percent(c.at_quantile) + " r" * c.needs_range for c in same) for same in by_P),
                *(" / ".join(percent(same[-1].met[k]) for same in by_P) for k in range(1, len(worst.LEVELS))),
                percent(own[0].beyond),
            ]
        )
        met = [[c.prompts, c.at_quantile, *c.met] for c in own if c.responses == worst.RESPONSES[-1]]
        drawn.append([f"{name}, {100 * share:g} %", ranged, met])
        wrong += [
            f"worst {percent(share)} %, {name}, range {range_text}, {c.prompts} x {c.responses}: met falsely "
            f"in {percent(c.met[0])} %, with t the quantile {percent(c.at_quantile)} %"
            for c in own
            if c.errs and ranged
        ]
    G = " / ".join(map(str, worst.RESPONSES))
    P = " / ".join(map(str, worst.PROMPTS))
    below = [f"met at {100 * part:g} % of it, {P} x {worst.RESPONSES[-1]}" for part in worst.LEVELS[1:]]
    return Found(
        {
            "worst": Grid(
                f'Worst share at its limit, false "met", %, with {G} responses a prompt',
                [
                    "cost",
                    "share, %",
                    "range",
                    *(f"{P} prompts" for P in worst.PROMPTS),
                    *(f"t the quantile, {P} prompts" for P in worst.PROMPTS),
                    *below,
                    "judged above the limit by, %",
                ],
                rows,
            )
        },
        {"worst": drawn},
        wrong,
    )


def multipliers_part(sizes: Sizes, run: Run) -> Found:
    """Holds the intervals of the one-shot multipliers against the true ones."""
    rows = [row for each in run(partial(_multipliers, sizes), multipliers.CELLS) for row in each]
    head, _, *lines = (line.strip("| ").split(" | ") for line in multipliers.table(rows))
    return Found({"multipliers": Grid("Intervals of the one-shot multipliers", head, lines)})


def _multipliers(sizes: Sizes, cell: multipliers.Cell) -> list[dict]:
    return multipliers.rows(sizes.replications, sizes.seed, [cell])


PARTS: dict[str, Callable[[Sizes, Run], Found]] = {
    "level": level_part,
    "rules": rules_part,
    "looks": looks_part,
    "families": families_part,
    "worst": worst_part,
    "power": power_part,
    "multipliers": multipliers_part,
}
# Those of docs/verdict-simulation.md. The multipliers take long; their table stands in docs/multipliers.md.
OF_PAGE = [name for name in PARTS if name != "multipliers"]
