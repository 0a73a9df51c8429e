"""The last stages: responses to held-out prompts, and the verdict on them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from engine import keys
from engine.constraints import Limit
from engine.files import move_aside, write_json, write_whole
from engine.looks import CONFIDENCE, share
from engine.policy.samples import Samples
from engine.policy.steps import Policy
from engine.policy.weights import Weights
from engine.records import Prompts, Units
from engine.report import certificate, run_page
from engine.run import judged, outputs
from engine.run.display import duration
from engine.run.rows import PolicyRow, VerdictRow, time_table
from engine.run.run import Stage
from engine.scorers.base import Scorers
from engine.stages import taken
from engine.stages.job import Job
from engine.stages.protocol import Result
from engine.stages.reference import Reference
from engine.stages.refusals import refused
from engine.stages.run_inputs import OwnedInputs, owned_inputs
from engine.stages.sampling import sample
from engine.verdict.evaluation import Asked, Evaluation, Side, evaluate
from engine.verdict.sentences import earlier_text, look_text, sentences

# How many times the KL of the tilt that it was fitted to a policy may have before a warning.
FAR = 2.5


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Holds what a policy is judged by: the constraints with their aims, and the units of the scores."""

    limits: Sequence[Limit]
    aimed: Sequence[float]  # in each constraint's own measure
    units: Units
    counted_in: str  # the run's --units
    audit_names: list[str]
    scorers: Scorers
    confidence: float = CONFIDENCE
    share: float = 1.0  # of 1 - confidence, what the one-sided bounds may spend
    looks: int = 1  # planned at most
    truncated: bool = False  # see `engine.config.RunConfig.truncated`


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at held-out responses: what is sampled for it, beside what the looks before it have."""

    number: int  # from 1
    prompts: Prompts  # those of which it takes new responses
    responses: int  # to each of them
    same_prompts: bool  # they have answered at the looks before
    earlier: int = 0  # verdicts before this one, see `engine.run.judged`

    def stage(self, side: str) -> str:
        """Names the stage that samples a side, "reference" or "policy"."""
        return f"heldout/{side}" if self.number == 1 else f"heldout/{side}-{self.number}"


def looks(job: Job) -> list[Look]:
    """Lists the looks that the verdict of a run may take."""
    sizes = job.config.looks(len(job.heldout_pool))
    first = sizes[0]
    found = [Look(number=1, prompts=job.heldout, responses=first.responses, same_prompts=False)]
    for number, (last, size) in enumerate(pairwise(sizes), start=2):
        same = size.prompts == last.prompts
        new = range(0 if same else last.prompts, size.prompts)
        prompts = job.heldout_pool.select(list(new))
        responses = size.responses - last.responses if same else size.responses
        found.append(Look(number=number, prompts=prompts, responses=responses, same_prompts=same))
    return found


def sample_heldout(job: Job, reference: Reference, weights: Weights | None, look: Look) -> Samples:
    """Runs the stage of a look: new responses of `weights` (None: of the reference) to held-out prompts."""
    name = look.stage("reference" if weights is None else "policy")
    purpose = keys.HELDOUT_REFERENCE if weights is None else keys.HELDOUT_POLICY
    if look.same_prompts:
        purpose = keys.look(purpose, look.number)

    def compute(stage: Stage) -> Samples:
        shared = None if weights is not None or job.samples is None else _shared(job, name, look)
        if shared is not None:
            samples = taken.shared(job, stage, shared)
        else:
            samples = sample(
                job,
                stage,
                look.prompts,
                weights,
                n=look.responses,
                purpose=purpose,
                recomputed=job.config.compares_with_reference,
            )
        if weights is None and job.given is not None and look.number == 1:
            taken.warn_of_scale(job, reference.samples, samples)
        if weights is not None and look.number == 1:
            stage.log(VerdictRow(earlier=look.earlier))
        return replace(samples, scaled=reference.scoring(stage, samples))

    return job.run.stage(name, Samples, compute)


def _shared(job: Job, stage: str, look: Look) -> Samples | None:
    """Loads the samples of a look from the run of --samples-of; None where it has not looked so often, or at
    other numbers of responses."""
    if look.number > 1 and stage not in job.samples.run.files:
        return None
    samples = job.samples.load(stage, Samples)
    alike = samples.rollouts.n == look.responses and samples.prompts.key_P.equal(look.prompts.key_P)
    return samples if alike or look.number == 1 else None


def give_verdict(
    job: Job,
    reference: Reference,
    policy: Policy | None,
    side: Callable[[str, Look], Samples],
    lam_J: Tensor,
) -> Result:
    """Looks at held-out responses until each constraint is met or not met, or the budget is spent; writes
    evaluation.json, heldout.jsonl, the certificate and the report.

    policy: what is judged; None for the reference. side: samples "reference" or "policy" for a look.
    """
    run, planned = job.run, looks(job)
    iterate, earlier = job.ranks.first(lambda: _begin(job))
    if earlier:
        run.display.line(earlier_text(earlier))
    evaluation = before = after = None
    for look in (replace(look, earlier=earlier) for look in planned):
        if evaluation is not None and look.same_prompts and evaluation.needs_prompts:
            break  # More responses to as few prompts give no word either.
        if look.number > 1:
            run.display.n_stages += 2
        new_before, new_after = side("reference", look), side("policy", look)
        before, after = (
            new if old is None else old.and_more(new, same_prompts=look.same_prompts)
            for old, new in ((before, new_before), (after, new_after))
        )
        bar = Bar(
            limits=reference.limits,
            aimed=reference.aimed,
            units=reference.units,
            counted_in=job.config.units,
            audit_names=reference.scoring.audit_names,
            truncated=job.config.truncated,
            scorers=job.scorers,
            share=share(earlier, look.number - 1, len(planned)),
            looks=len(planned),
        )
        evaluation = _told(job, before, after, bar, evaluation)
        if evaluation.is_decided:
            break
        if len(planned) > 1:
            run.display.line(look_text(evaluation))

    def write() -> None:
        certified = certificate.certificate(
            what_was_made(owned_inputs(run.folder), iterate, {} if policy is None else policy.adapter),
            certificate.Judging(
                evaluation=evaluation, prompts=before.prompts, seed=job.config.seed, earlier=earlier
            ),
        )
        _write(job, evaluation, certified, before, after)

    job.ranks.first(write)
    if job.ranks.is_first:
        _compare_with_tilt(job, evaluation, iterate)
    return Result(folder=run.folder, evaluation=evaluation, lam=lam_J.tolist())


def _begin(job: Job) -> tuple[int, int]:
    """Puts the verdict on record; returns the iterate that it judges and how many verdicts came before."""
    run = job.run
    iterate = max(run.paths.iterates(), default=0)
    attempt = judged.Attempt.of(run.contents, iterate, job.heldout_pool, job.config.seed)
    begun = run.rows(VerdictRow)
    earlier = begun[0].earlier if begun else judged.earlier(run.paths, attempt)
    judged.begin(run.paths, attempt, earlier)
    return iterate, earlier


def _told(job: Job, before: Samples, after: Samples, bar: Bar, earlier: Evaluation | None) -> Evaluation:
    """Returns rank 0's verdict, see `judge`."""
    return job.ranks.first(lambda: judge(before, after, bar, earlier))


def what_was_made(
    owned: OwnedInputs,
    iterate: int,
    weights: Mapping[str, Tensor],
    scorers: Mapping[str, Mapping[str, str]] | None = None,
) -> certificate.Made:
    """Returns what a certificate says of an iterate and of what it was made from.

    weights: the iterate's, none for the reference. scorers: what those were that judge it, as
    `engine.scorers.find.content` gives them; None: the run's own.
    """
    record = owned.record
    return certificate.Made(
        contents=owned.contents,
        iterate=iterate if weights else 0,
        weights=certificate.weights_digest(weights) if weights else "",
        train=record.train,
        sources=record.sources,
        model=record.model,
        scorers=record.scorers if scorers is None else scorers,
        changed_scorers=owned.accepted(),
    )


def _write(job: Job, evaluation: Evaluation, certified: dict, before: Samples, after: Samples) -> None:
    """Writes and says the verdict."""
    run = job.run
    run.align([])  # The report reads the rows.
    made = [run.paths.evaluation, run.paths.heldout, run.paths.certificate, run.paths.certificate_html]
    made += [run.paths.report_png, run.paths.report_html]
    for path in made:
        if outputs.has(run.paths, path) and not outputs.is_whole(run.paths, path):
            run.display.warn(f"{path} is not as it was written: made again from {run.paths.stages}")
        move_aside(path)
    write_heldout(run.paths.heldout, before, after)
    write_json(run.paths.evaluation, evaluation.as_dict())
    certificates = certificate.write(run.folder, certified)
    for line in sentences(evaluation):
        run.display.line(line)
    written = run_page.write(run.folder)
    outputs.note(run.paths, made)
    run.display.table(
        [
            [stage, duration(seconds), f"{100 * share:.0f} %"]
            for stage, seconds, share in time_table(run.folder)
        ],
        ["where the time went", "time", "share"],
    )
    run.display.line(f"certificate: {' and '.join(map(str, certificates))}")
    run.display.line(f"report: {' and '.join(map(str, written))}")


def _compare_with_tilt(job: Job, evaluation: Evaluation, iterate: int) -> None:
    """Says how far the policy is from the reference, beside what its target needs."""
    asked = [row.tilt_kl for row in job.run.rows(PolicyRow) if row.iteration == iterate]
    if not asked or not asked[-1] or evaluation.truncated:
        return
    ratio = evaluation.kl.mean / asked[-1]
    line = f"the policy's KL is {ratio:.1f} times that of the tilt it was fitted to, {asked[-1]:.2f} nats"
    if ratio > FAR:
        job.run.display.warn(f"{line}: it went further than its reward and constraints ask for")
    else:
        job.run.display.line(line)


def judge(before: Samples, after: Samples, bar: Bar, earlier: Evaluation | None = None) -> Evaluation:
    """Returns the verdict on samples of the reference and of a policy. earlier: that of the look before."""
    policy, reference = (
        Side(
            rollouts=side.rollouts,
            texts=side.texts,
            scores=side.scaled,
            refused=refused(bar.scorers, side.scores),
        )
        for side in (after, before)
    )
    asked = Asked(
        limits=bar.limits,
        aims=bar.aimed,
        unit_J=bar.units.utility_J,
        truncated=bar.truncated,
        units=bar.counted_in,
        confidence=bar.confidence,
        share=bar.share,
        looks=bar.looks,
    )
    return evaluate(policy, reference, before.prompts, after.kl_PG, asked, bar.audit_names, earlier)


def write_heldout(path: Path, before: Samples, after: Samples) -> None:
    """Writes heldout.jsonl: a line per prompt and response of either side, with their scores in units."""
    prompts, n = before.prompts, before.rollouts.n
    lines = []
    for p in range(len(prompts)):
        for i in range(n):
            row = {"prompt": prompts.text[p], "kind": prompts.kind[p], "sample": i}
            for name, side in (("reference", before), ("policy", after)):
                r = p * n + i
                row[name] = side.texts[r]
                row[f"{name}_finished"] = bool(side.rollouts.finished[r])
                row[f"{name}_reward"] = float(side.scaled.reward_PG[p, i])
                row[f"{name}_utility"] = side.scaled.utility_PGJ[p, i].tolist()
                row[f"{name}_audit"] = side.scaled.audit_PGA[p, i].tolist()
            lines.append(json.dumps(row, sort_keys=True, ensure_ascii=False))
    write_whole(path, ("\n".join(lines) + "\n").encode())
