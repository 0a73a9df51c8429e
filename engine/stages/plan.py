"""`python -m engine.evaluate --plan`: how many held-out prompts a verdict needs, before it is asked for.

The bounds are those of the last of a run's looks, on numbers that are drawn as `engine.verdict.planning`
assumes them.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from engine import constraints
from engine.config import CaidConfig, EvaluateConfig, RunConfig, check, was_by_preference
from engine.constraints import Limit, Rate
from engine.constraints.kinds import variances
from engine.errors import UserError
from engine.intervals import betting, number
from engine.looks import share
from engine.run.committed import Committed, read_committed
from engine.run.display import Display
from engine.run.rows import ReferenceRow
from engine.stages.reference import ReferenceSamples, units_of
from engine.verdict import planning

Row = tuple[str, str, int | None]


def say(run: str, flags: EvaluateConfig) -> None:
    """Prints how many prompts each constraint of a run needs, or constraints as the flags have them.

    run: "" for none. Raises: UserError.
    """
    check(flags)
    committed = read_committed(Path(run)) if run else None
    config = committed.config if committed else CaidConfig()
    sizes, G = config.looks(), flags.n_responses or config.eval_responses
    alpha = (1 - flags.confidence) * share(0, len(sizes) - 1, len(sizes))
    rows = _of_run(committed, config, flags, G, alpha) if committed else _of_flags(flags, G, alpha)
    look = "at the only look" if len(sizes) == 1 else f"at the last of {len(sizes)} looks"
    display = Display(n_stages=0)
    display.table(
        [[f"{asked}, where {assumed}", _count(prompts)] for asked, assumed, prompts in rows],
        ["what is confirmed", "prompts"],
    )
    display.line(
        f"so many held-out prompts confirm it in {100 * planning.POWER:g} % of verdicts, with {G} responses "
        f"of policy and reference each, {look}: bounds that err in {100 * alpha:.2g} % "
        "of cases"
    )
    display.line(f"{'this run' if run else 'a run'} looks at {', then '.join(map(str, sizes))} at most")


def _count(prompts: int | None) -> str:
    return f"over {planning.MOST_PROMPTS}" if prompts is None else f"{prompts}"


def _of_flags(flags: EvaluateConfig, G: int, alpha: float) -> Iterator[Row]:
    """Plans without a run: one unit is the spread of responses to a prompt."""
    yield from _improvements("improvement", flags, 1.0, G, alpha, None)
    for limit in flags.cost_rate:
        yield from _rates("rate", limit, flags, flags.correlation, G, alpha)


def _of_run(
    committed: Committed, config: RunConfig, flags: EvaluateConfig, G: int, alpha: float
) -> Iterator[Row]:
    """Plans by the reference's responses to a run's training prompts."""
    if flags.cost_rate:
        raise UserError("--cost-rate: the run has its own limits; leave it out, or leave RUN out.")
    reference = committed.one(ReferenceRow)
    limits = constraints.limits(config, reference.names, reference.worst_above)
    units = units_of(reference, limits, config.units)
    samples = committed.load("reference", ReferenceSamples).samples
    utility_PGJ = units.apply(samples.scores).utility_PGJ
    ratios = was_by_preference(committed.contents.algorithm, committed.contents.config)
    for j, limit in enumerate(limits):
        own_PG = utility_PGJ[limit.rows(samples.prompts), :, j]
        # Utilities that are log-ratios come later than the reference, in units of their own spread.
        within = 1.0 if ratios else math.sqrt(variances(own_PG)[0])
        if isinstance(limit, Rate):
            within, between = variances(own_PG)
            yield from _rates(limit.name, limit.value, flags, between / (between + within), G, alpha)
        elif limit.at_most:
            yield from _means(limit, own_PG, units.utility_J[j], flags, G, alpha)
        else:
            span = limit.span(units.utility_J[j])
            beyond = None if span is None else (span[0] - limit.value, span[1] - limit.value)
            yield from _improvements(limit.name, flags, within, G, alpha, beyond)


def _improvements(
    name: str, flags: EvaluateConfig, within: float, G: int, alpha: float, span: tuple[float, float] | None
) -> Iterator[Row]:
    told = f"responses spread by {within:.3g} within prompts and the effect by {flags.between:g} between them"
    for slack in flags.slack:
        draw = planning.normal(slack, within, flags.between, G, span)
        yield f"{name} {slack:g} beyond b", told, planning.prompts_needed(draw, alpha, span)


def _means(
    limit: Limit, own_PG: Tensor, unit: float, flags: EvaluateConfig, G: int, alpha: float
) -> Iterator[Row]:
    within, between = variances(own_PG)
    told = f"mean costs of prompts spread by {number(unit * math.sqrt(between + within / G))}"
    span = limit.span(unit)
    if span is not None:
        span = limit.value - span[1], limit.value - span[0]
    for slack in flags.slack:
        # As of an improvement, whose reference has the other half of the variance.
        draw = planning.normal(slack * unit, unit * math.sqrt(within / 2), unit * math.sqrt(between), G, span)
        asked = f"{limit.name} {number(slack * unit)} below {limit.value:g}"
        yield asked, told, planning.prompts_needed(draw, alpha, span)


def _rates(
    name: str, limit: float, flags: EvaluateConfig, correlation: float, G: int, alpha: float
) -> Iterator[Row]:
    asked = f"{name} at most {100 * limit:g} %"
    yield asked, "no response is unsafe", betting.fewest(limit, alpha)
    rate = flags.true_rate or limit / 3
    if rate >= limit:
        raise UserError(f"--true-rate {rate:g}: must lie below the limit {limit:g}.")
    told = f"{100 * rate:.3g} % are unsafe, with a correlation of {correlation:.2g}"
    draw = planning.unsafe(limit, rate, correlation, G)
    yield asked, told, planning.prompts_needed(draw, alpha, (limit - 1, limit))
