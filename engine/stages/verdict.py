"""The last stages: responses to held-out prompts, and the verdict on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from engine import keys
from engine.constraints import Limit
from engine.files import move_aside, write_json, write_whole
from engine.policy.samples import Samples
from engine.policy.weights import Weights
from engine.records import Units
from engine.report import run_page
from engine.run import outputs
from engine.run.display import duration
from engine.run.rows import time_table
from engine.run.run import Stage
from engine.scorers.base import Scorers
from engine.stages import taken
from engine.stages.job import Job
from engine.stages.protocol import Result
from engine.stages.reference import Reference
from engine.stages.refusals import refused
from engine.stages.sampling import sample
from engine.verdict.evaluation import Asked, Evaluation, Side, evaluate
from engine.verdict.sentences import sentences


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Holds what a policy is judged by: the constraints with their aims, and the units of the scores."""

    limits: Sequence[Limit]
    aimed: Sequence[float]  # in each constraint's own measure
    units: Units
    counted_in: str  # the run's --units
    audit_names: list[str]
    scorers: Scorers
    confidence: float = 0.95
    truncated: bool = False  # see `engine.config.RunConfig.truncated`


def sample_heldout(job: Job, reference: Reference, weights: Weights | None) -> Samples:
    """Runs stage heldout/reference or heldout/policy: responses of `weights` (None: of the reference)
    to the held-out prompts."""
    config, prompts = job.config, job.heldout
    name = "heldout/reference" if weights is None else "heldout/policy"
    purpose = keys.HELDOUT_REFERENCE if weights is None else keys.HELDOUT_POLICY

    def compute(stage: Stage) -> Samples:
        if weights is None and job.samples is not None:
            samples = taken.shared(job, stage, job.samples.load(name, Samples))
        else:
            samples = sample(job, stage, prompts, weights, n=config.eval_responses, purpose=purpose)
        if weights is None and job.given is not None:
            taken.warn_of_scale(job, reference.samples, samples)
        return replace(samples, scaled=reference.scoring(stage, samples))

    return job.run.stage(name, Samples, compute)


def judge_heldout(job: Job, reference: Reference, before: Samples, after: Samples, lam_J: Tensor) -> Result:
    """Judges the policy's held-out responses (`after`) against the reference's; writes evaluation.json,
    heldout.jsonl and the report."""
    run = job.run
    bar = Bar(
        limits=reference.limits,
        aimed=reference.aimed,
        units=reference.units,
        counted_in=job.config.units,
        audit_names=reference.scoring.audit_names,
        truncated=job.config.truncated,
        scorers=job.scorers,
    )
    evaluation = judge(before, after, bar)
    run.align([])  # The report reads the rows.
    made = [run.paths.evaluation, run.paths.heldout, run.paths.report_png, run.paths.report_html]
    for path in made:
        if outputs.has(run.paths, path) and not outputs.is_whole(run.paths, path):
            run.display.warn(f"{path} is not as it was written: made again from {run.paths.stages}")
        move_aside(path)
    write_heldout(run.paths.heldout, before, after)
    write_json(run.paths.evaluation, evaluation.as_dict())
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
    run.display.line(f"report: {' and '.join(map(str, written))}")
    return Result(folder=run.folder, evaluation=evaluation, lam=lam_J.tolist())


def judge(before: Samples, after: Samples, bar: Bar) -> Evaluation:
    """Returns the verdict on samples of the reference and of a policy."""
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
    )
    return evaluate(policy, reference, before.prompts, after.kl_PG, asked, bar.audit_names, bar.confidence)


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
