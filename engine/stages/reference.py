"""Stage reference: sample the reference, or take its samples from elsewhere, and fix what they fix:
units, required improvements and aims."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine import constraints, dual, keys
from engine.config import RunConfig
from engine.constraints import Limit, WorstShare
from engine.errors import UserError
from engine.looks import last_error
from engine.model import packing
from engine.model.packing import LowerStates
from engine.policy.lora import first_layer
from engine.policy.samples import Samples
from engine.records import Prompts, ScaledScores, Scored, Scores, Units, counted_utilities
from engine.run.rows import ReferenceRow
from engine.run.run import Stage
from engine.scorers.base import Scorer, Scorers, TextScorer
from engine.stages import taken, worst_share
from engine.stages.job import Job
from engine.stages.sampling import gap_of, sample

# The multiple of the aims that the samples have to support before a margin is added to the thresholds.
SUPPORTED = 1.5


@dataclass(frozen=True, kw_only=True)
class ReferenceSamples:
    """The result of stage reference: the samples, and the states below the adapter
    in the order of their packed groups."""

    samples: Samples
    lower_MD: Tensor | None


class Scoring(Protocol):
    """From the scorers' own scores of responses to those in the run's units."""

    units: Units
    audit_names: list[str]

    def __call__(self, stage: Stage, samples: Samples) -> ScaledScores:
        """Returns scores in the run's units. stage: of a run, or anything else with
        `progress` and `check_stop`."""


@dataclass(frozen=True, kw_only=True)
class ByScorers:
    """Scores by the run's scorers."""

    units: Units
    audit_names: list[str]

    def __call__(self, stage: Stage, samples: Samples) -> ScaledScores:
        return self.units.apply(samples.scores)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Reference samples of the training prompts, and what is fixed by them: units, thresholds aimed at."""

    samples: Samples  # scored in the run's units; with the states below the adapter unless too large to keep
    scoring: Scoring
    limits: list[Limit]
    # float64 [J]: improvements that the constraints ask for, in units; b itself where they are given so
    needed_J: Tensor
    aimed: list[float]  # what to aim at, in each constraint's own measure
    aim_J: Tensor  # float64 [J]: the improvements to aim at, in units
    margin: float  # of the aims: --margin, or what `aims` leaves of it

    @property
    def units(self) -> Units:
        """One unit of each score."""
        return self.scoring.units

    @property
    def prompts(self) -> Prompts:
        """The training prompts."""
        return self.samples.prompts

    @property
    def scores(self) -> ScaledScores:
        """The scores of the reference's responses in the run's units."""
        return self.samples.scaled

    def scored(self, samples: Samples, missing_PJ: Tensor | None = None) -> Scored:
        """Returns the scores of any samples as the rule of an algorithm sees them."""
        return Scored(
            reward_PG=samples.scaled.reward_PG,
            utility_PGJ=samples.scaled.utility_PGJ,
            weight_PJ=constraints.weights(self.limits, samples.prompts, self.prompts),
            cost_PGJ=-samples.scores.utility_PGJ,
            missing_PJ=missing_PJ,
        )

    @property
    def problem(self) -> tuple[Tensor, Tensor]:
        """Returns reward [P, G] and utilities [P, G, J] of the reference's samples as the Lagrangian counts
        them: what the dual is solved on."""
        return self.scores.reward_PG, self.scored(self.samples).counted_PGJ

    def missing(self, utility_PGJ: Tensor, chosen: Sequence[int]) -> Tensor:
        """Measures what each of the prompts `chosen` misses of its constraints,
        float64 [P, J]; utilities in units."""
        before_PGJ = self.scores.utility_PGJ[list(chosen)]
        return constraints.missing(self.limits, self.aimed, self.aim_J, self.units, utility_PGJ, before_PGJ)


def sample_reference(job: Job) -> Reference:
    """Runs stage reference: samples and scores the reference offline (Algorithm 2, step 1),
    and fixes the units and the aim."""
    config = job.config
    prompts = job.train
    shared = None if job.samples is None else job.samples.load("reference", ReferenceSamples)

    def compute(stage: Stage) -> ReferenceSamples:
        if shared is not None:
            samples = taken.shared(job, stage, shared.samples, shared.lower_MD)
        elif job.given is not None:
            samples = taken.given(job, stage)
        else:
            samples = sample(
                job,
                stage,
                prompts,
                None,
                n=config.n_responses,
                purpose=keys.REFERENCE,
                keep=True,
                recomputed=config.compares_with_reference,
            )
        limits = limits_of(job, samples)
        # Others have been checked before anything was sampled.
        chosen = [limit for limit in limits if isinstance(limit, WorstShare)]
        constraints.check_confirmable(chosen, job.heldout_pool, error_of(job))
        fixed = reference_of(job, samples, limits)
        r, g = fixed.scores.reward_PG, fixed.scores.utility_PGJ
        sd = deviations(samples.scores, job.scorers, limits, prompts)
        groups = packing.groups(prompts, samples.rollouts)
        stage.log(
            ReferenceRow(
                names=[s.name for s in job.scorers.costs],
                audit_names=[s.name for s in job.scorers.audits],
                reward_sd=sd.reward,
                utility_sd=sd.utility_J,
                audit_sd=sd.audit_A,
                correlation=[within_correlation(r, g[..., j]) for j in range(g.shape[2])],
                finished=float(samples.rollouts.finished.double().mean()),
                mean_length=float(samples.rollouts.length.double().mean()),
                prompts=len(prompts),
                responses=config.n_responses,
                needed=fixed.needed_J,
                aimed=fixed.aimed,
                aim=fixed.aim_J,
                margin=fixed.margin,
                worst_above=[limit.above if isinstance(limit, WorstShare) else None for limit in limits],
            )
        )
        lower_MD = samples.lower.of(groups).cpu() if samples.lower else None
        return ReferenceSamples(samples=replace(samples, lower=None), lower_MD=lower_MD)

    saved = job.run.stage("reference", ReferenceSamples, compute)
    samples = saved.samples
    # Shared states stay where they are: they are hundreds of megabytes.
    lower_MD = saved.lower_MD if shared is None else shared.lower_MD
    if lower_MD is not None:
        lower = LowerStates(first_layer(job.model.config.num_layers, config.lora_from))
        lower.keep(packing.groups(prompts, samples.rollouts), lower_MD.to(job.model.device))
        samples = replace(samples, lower=lower)
    (row,) = job.run.rows(ReferenceRow)
    reference = reference_of(job, samples, constraints.limits(config, row.names, row.worst_above))
    gap, show = gap_of(job.run, "reference"), job.run.display
    show.line(
        f"reference: {len(prompts)} prompts x {config.n_responses} responses, "
        f"{100 * row.finished:.0f} % finished, mean length "
        f"{row.mean_length:.0f} tokens{f'; {gap}' if gap else ''}"
    )
    if config.units == "raw":
        show.line(f"reference means: {means_text(job, samples.scores)}")
    for j, limit in enumerate(reference.limits):
        opening = limit.opening(
            float(reference.needed_J[j]),
            reference.aimed[j],
            reference.units.utility_J[j],
            len(limit.rows(prompts)),
        )
        in_units = units_text(row.utility_sd[j], config.units)
        show.line(f"{opening} ({in_units}); correlation with the reward {row.correlation[j]:+.2f}")
    if reference.margin < config.margin:
        show.line(
            f"--margin {config.margin:g} is lowered to {reference.margin:.2g}, so that the aims stay below "
            f"two thirds of what {config.n_responses} responses of each prompt support"
        )
    for a, scorer in enumerate(job.scorers.audits):
        if is_counted_alone(samples.scores.audit_PGA[..., a], scorer):
            show.line(
                f"audit {scorer.name}: all of the reference's responses to each prompt have the same, so it "
                "counts in its own unit"
            )
    return reference


def means_text(job: Job, scores: Scores) -> str:
    """Says the means of the reference's reward and costs, in the scorers' own units."""
    costs = zip(job.scorers.costs, (-scores.utility_PGJ).mean((0, 1)).tolist(), strict=True)
    each = [f"reward {float(scores.reward_PG.mean()):.2f}", *(f"{s.name} {mean:.2f}" for s, mean in costs)]
    return f"{', '.join(each)} (costs: smaller is better)"


def reference_of(job: Job, samples: Samples, limits: list[Limit] | None = None) -> Reference:
    """Fixes units, required improvements and aims from reference samples. limits: `limits_of`, where they are
    known."""
    limits = limits_of(job, samples) if limits is None else limits
    return _reference_of(job, job.scorers, samples, limits)


def _reference_of(
    job: Job, scorers: Scorers, samples: Samples, limits: list[Limit], *, lower: bool = True
) -> Reference:
    found = deviations(samples.scores, scorers, limits, samples.prompts)
    units = found.as_raw() if job.config.units == "raw" else found
    scaled = units.apply(samples.scores)
    return Reference(
        samples=replace(samples, scaled=scaled),
        scoring=ByScorers(units=units, audit_names=[s.name for s in scorers.audits]),
        limits=limits,
        **aims(job, limits, samples.prompts, scaled, units, lower=lower),
    )


def limits_of(job: Job, samples: Samples) -> list[Limit]:
    """Returns the constraints of a run, one for each cost, with what the reference's samples fix of them."""
    limits = constraints.limits(job.config, [s.name for s in job.scorers.costs])
    if not any(isinstance(limit, WorstShare) for limit in limits):
        return limits
    place = {limit.name: j for j, limit in enumerate(limits)}
    cost_J = [
        -samples.scores.utility_PGJ[limit.rows(samples.prompts), :, j] for j, limit in enumerate(limits)
    ]
    error = error_of(job)

    def worth(fixed: Sequence[Limit]) -> worst_share.Worth | None:
        own = [place[limit.name] for limit in fixed]
        scorers = replace(job.scorers, costs=tuple(job.scorers.costs[j] for j in own))
        scores = replace(samples.scores, utility_PGJ=samples.scores.utility_PGJ[..., own])
        if not all(constraints.can_confirm(limit, job.heldout_pool, error) for limit in fixed):
            return None
        try:
            # With the whole margin, so that no choice looks better for a lower one.
            at = _reference_of(job, scorers, replace(samples, scores=scores), list(fixed), lower=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is chosen, the run itself warns
                solution = solved(at, job.config, explain=False)
        except UserError:
            return None
        slack_J = (solution.predicted_improvement - at.aim_J) * torch.tensor(at.units.utility_J)
        return worst_share.Worth(objective=solution.value, slack_J=slack_J.tolist())

    return worst_share.choose(limits, cost_J, worth)


def solved(
    reference: Reference, config: RunConfig, start_J: Tensor | None = None, *, explain: bool = True
) -> dual.Solution:
    """Solves for the multipliers of the aimed thresholds, from reference samples (`dual.solve`). Raises:
    dual.Infeasible for unsupported thresholds unless --force."""
    return dual.solve(
        *reference.problem,
        reference.aim_J,
        config.beta,
        start_J=start_J,
        bounds=[limit.highest for limit in reference.limits],
        lam_max=config.lam_max,
        force=config.force,
        explain=explain,
    )


def error_of(job: Job) -> float:
    """Returns the error of a one-sided bound at the last look that the verdict may take."""
    return last_error(len(job.config.looks(len(job.heldout_pool))))


def aims(
    job: Job,
    limits: list[Limit],
    prompts: Prompts,
    scores: ScaledScores,
    units: Units,
    *,
    lower: bool = True,
) -> dict:
    """Returns the fields needed_J, aimed, aim_J and margin of a `Reference`; scores: of its samples.

    With `lower` the margin is lowered, down to 0, until the samples support `SUPPORTED` times the aims:
    nearer to what they support at most, the tilt rests on the one best response of each prompt, and its
    multiplier goes from 3 to 8 for a tenth more.
    """
    config = job.config
    needed_J = constraints.required(limits, scores, prompts, units)
    counted_PGJ = scores.utility_PGJ * constraints.weights(limits, prompts, prompts)[:, None]

    def at(margin: float) -> dict:
        aimed = constraints.aims(
            limits,
            scores,
            prompts,
            units,
            margin=margin,
            heldout=job.heldout,
            n_responses=config.eval_responses,
        )
        aim_J = constraints.aimed_improvement(limits, aimed, needed_J, units)
        return {"needed_J": needed_J, "aimed": aimed, "aim_J": aim_J, "margin": margin}

    def supported(found: dict) -> bool:
        return dual.largest_multiple(counted_PGJ, found["aim_J"]) >= SUPPORTED

    whole = at(config.margin)
    if not lower or config.margin == 0 or supported(whole):
        return whole
    least, most = 0.0, config.margin
    for _ in range(16):
        middle = (least + most) / 2
        least, most = (middle, most) if supported(at(middle)) else (least, middle)
    return at(least)


def deviations(scores: Scores, scorers: Scorers, limits: Sequence[Limit], prompts: Prompts) -> Units:
    """Measures the pooled within-prompt standard deviations of the reference's scores on `prompts`.

    Raises: UserError for a scorer that is constant within every prompt, also where it is so on those
    that its constraint is about; but not for an audit that counts, see `audit_unit`.
    """
    counted_J = [limit.counted for limit in limits]
    utility_PGJ = counted_utilities(scores.utility_PGJ, counted_J)
    for j, limit in enumerate(limits):
        on, own = f" on {limit.on} prompts" if limit.on else "", limit.rows(prompts)
        limit.check_reference(scores.utility_PGJ[own, :, j])
        _deviation(-utility_PGJ[own, :, j], f"scorer {limit.name}{on}")
    return Units(
        reward=_deviation(scores.reward_PG, f"scorer {scorers.reward.name}"),
        utility_J=[_deviation(-utility_PGJ[..., j], f"scorer {s.name}") for j, s in enumerate(scorers.costs)],
        audit_A=[audit_unit(scores.audit_PGA[..., a], s) for a, s in enumerate(scorers.audits)],
        counted_J=counted_J,
    )


def audit_unit(score_PG: Tensor, scorer: Scorer) -> float:
    """Measures the unit of an audit: the deviation within prompts, or 1 for `is_counted_alone`."""
    return 1.0 if is_counted_alone(score_PG, scorer) else _deviation(-score_PG, f"scorer {scorer.name}")


def is_counted_alone(score_PG: Tensor, scorer: Scorer) -> bool:
    """Tells whether an audit counts something that all responses to each prompt have equally often, such as
    refusals of a model that never refuses: it has no deviation, and is reported in its own unit."""
    counts = isinstance(scorer, TextScorer) and scorer.counts
    return counts and bool((score_PG == score_PG[:, :1]).all())


def _deviation(score_PG: Tensor, name: str) -> float:
    """Measures `dual.within_deviation`; a score that is one number everywhere is
    an error that names the number."""
    if score_PG.min() == score_PG.max():
        raise UserError(
            f"{name} gave {float(score_PG[0, 0]):g} for every response of the reference, so there is "
            "nothing to align; use another one, or "
            "prompts whose answers it tells apart."
        )
    return dual.within_deviation(score_PG, name)


def units_of(row: ReferenceRow, limits: Sequence[Limit], units: str) -> Units:
    """Returns the units that a run fixed; `units` is its setting of that name."""
    found = Units(
        reward=row.reward_sd,
        utility_J=row.utility_sd,
        audit_A=row.audit_sd,
        counted_J=[limit.counted for limit in limits],
    )
    return found.as_raw() if units == "raw" else found


def units_text(deviation: float, units: str) -> str:
    """Says in which of --units a line counts, and what the standard deviation of its scorer is."""
    if units == "raw":
        return f"the scorer's own units; its within-prompt standard deviation is {deviation:.3g}"
    return f"within-prompt standard deviations; one is {deviation:.3g} of the scorer's units"


def within_correlation(a_PG: Tensor, b_PG: Tensor) -> float:
    """Correlates two scores within prompts, pooled."""
    a, b = a_PG - a_PG.mean(1, keepdim=True), b_PG - b_PG.mean(1, keepdim=True)
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
