"""The last stages: responses to held-out prompts, and the verdict on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from engine.constraints import Limit
from engine.files import write_json, write_whole
from engine.records import Prompts, Scores, Units
from engine.report import run_page
from engine.run.display import duration
from engine.run.rows import time_table
from engine.stages.job import Job
from engine.stages.protocol import Result
from engine.stages.reference import Reference
from engine.stages.sampling import Sampled
from engine.verdict.evaluation import Asked, Evaluation, Side, evaluate
from engine.verdict.sentences import sentences


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Responses to the held-out prompts with the scorers' own scores, and their scores in the run's units."""

    sampled: Sampled
    scores: Scores

    @property
    def judged(self) -> Sampled:
        """The responses with their scores in units."""
        return replace(self.sampled, scores=self.scores)


def verdict(
    job: Job, reference: Reference, prompts: Prompts, before: Sampled, after: Sampled, audit_names: list[str], lam_J: Tensor
) -> Result:
    """Judge the policy's held-out responses (`after`, scores in units) against the reference's; evaluation.json, heldout.jsonl, report."""
    run = job.run
    evaluation = judge(prompts, before, after, reference.limits, reference.aimed, reference.units, audit_names)
    write_heldout(run.folder, prompts, before, after)
    write_json(run.folder / "evaluation.json", evaluation.as_dict())
    for line in sentences(evaluation):
        run.display.line(line)
    written = run_page.write(run.folder)
    run.display.table(
        [[stage, duration(seconds), f"{100 * share:.0f} %"] for stage, seconds, share in time_table(run.folder)],
        ["where the time went", "time", "share"],
    )
    run.display.line(f"report: {' and '.join(map(str, written))}")
    return Result(folder=run.folder, evaluation=evaluation, lam=lam_J.tolist())


def judge(
    prompts: Prompts, before: Sampled, after: Sampled, limits: Sequence[Limit], aimed: Sequence[float], units: Units,
    audit_names: list[str], confidence: float = 0.95,
) -> Evaluation:  # fmt: skip
    """The verdict on samples of the reference and of a policy, with scores in units."""
    policy, reference = (Side(rollouts=s.rollouts, texts=s.texts, scores=s.scores) for s in (after, before))
    asked = Asked(limits=limits, aims=aimed, unit_J=units.utility_J)
    return evaluate(policy, reference, prompts, after.kl_PG, asked, audit_names, confidence)


def write_heldout(folder: Path, prompts: Prompts, before: Sampled, after: Sampled) -> None:
    """Write heldout.jsonl: a line per prompt and response of either side, with their scores in units."""
    n = before.rollouts.n
    lines = []
    for p in range(len(prompts)):
        for i in range(n):
            row = {"prompt": prompts.text[p], "kind": prompts.kind[p], "sample": i}
            for name, sampled in (("reference", before), ("policy", after)):
                r = p * n + i
                row[name] = sampled.texts[r]
                row[f"{name}_finished"] = bool(sampled.rollouts.finished[r])
                row[f"{name}_reward"] = float(sampled.scores.reward_PG[p, i])
                row[f"{name}_utility"] = sampled.scores.utility_PGJ[p, i].tolist()
                row[f"{name}_audit"] = sampled.scores.audit_PGA[p, i].tolist()
            lines.append(json.dumps(row, sort_keys=True, ensure_ascii=False))
    write_whole(folder / "heldout.jsonl", ("\n".join(lines) + "\n").encode())
