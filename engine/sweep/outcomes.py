"""Reads what a sweep has given so far: the dual's solutions, and the outcome of each
run, read from its folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine import constraints
from engine.constraints import Limit
from engine.run import outputs
from engine.run.committed import read_committed
from engine.run.folder import RunFolder
from engine.run.rows import (
    IterationRow,
    ReferenceRow,
    SpeedRow,
    StageTimeRow,
    StepRow,
    read_timing,
)
from engine.stages.run_inputs import DamagedInputs, owned_inputs
from engine.sweep.plans import Plan
from engine.verdict.evaluation import Evaluation


class OneShot(NamedTuple):
    """The dual's solution on a seed's reference samples for one problem of the sweep."""

    threshold: tuple[float, ...]
    beta: float
    margin: float
    aim: list[float]
    lam: list[float]
    predicted: list[float]  # improvement at these multipliers
    ess: float  # mean effective sample size of a prompt


@dataclass(kw_only=True)
class Outcome:
    """A finished or failed run: its verdict, or its error, and what it cost."""

    plan: Plan
    evaluation: Evaluation | None = None
    error: str = ""
    limits: list[Limit] = field(default_factory=list)  # the constraints
    lam: list[float] = field(default_factory=list)  # multipliers of the last policy
    iterations: list[IterationRow] = field(default_factory=list)
    tokens: int = 0  # sampled in training by this run
    reference_tokens: int = 0  # of the reference's samples for training, which the runs of a seed share
    steps: int = 0  # policy steps
    seconds: float = 0.0  # of training, without the reference's samples


def finished(plan: Plan) -> bool:
    """Tells whether a run has its verdict and all that it wrote is whole.

    Such a run is counted; another is trained, or restored from its stages.
    """
    paths = RunFolder(plan.folder)
    if not outputs.is_whole(paths, paths.evaluation) or outputs.damaged(paths, paths.path):
        return False
    run = read_committed(plan.folder)
    try:
        copies = owned_inputs(plan.folder).copies_are_whole()
    except DamagedInputs:
        return False
    return copies and not run.broken and run.wrote_its_rows()


def read_run(plan: Plan, error: str = "") -> Outcome:
    """Reads the folder of a run that is done, or has failed with `error`."""
    run = read_committed(plan.folder)
    tokens, seconds = effort(plan.folder)
    reference = run.one(ReferenceRow)
    reference_tokens, _ = effort(Path(plan.config.samples_of))
    outcome = Outcome(
        plan=plan,
        error=error,
        limits=constraints.limits(plan.config, reference.names, reference.worst_above),
        tokens=sum(n for stage, n in tokens.items() if is_training(stage)),
        reference_tokens=reference_tokens.get("reference", 0),
        steps=len(run.rows(StepRow)),
        seconds=sum(s for stage, s in seconds.items() if is_training(stage)),
        iterations=run.rows(IterationRow),
    )
    if not error:
        outcome.evaluation = Evaluation.read(
            RunFolder(plan.folder).evaluation, cure=f"go on with --resume {plan.folder}"
        )
        outcome.lam = kept_lam(plan.folder) or outcome.iterations[0].lam
    return outcome


def kept_lam(folder: Path) -> list[float] | None:
    """Reads the multipliers that the judged policy of a run was trained at.

    None where --max-kl rejected the first policy, so that the verdict is on the reference.
    """
    kept = list(read_committed(folder).iterates.values())
    return kept[-1] if kept else None


def effort(folder: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Reads the sampled tokens and the seconds of each stage of a run, by its name.

    Only the last attempt at a stage counts: one that was interrupted had sampled the same responses. The
    seconds that a policy stage took before an interruption are thus left out.
    """
    tokens = {row.stage: row.tokens for row in read_timing(folder, SpeedRow)}
    seconds = {row.stage: row.seconds for row in read_timing(folder, StageTimeRow)}
    return tokens, seconds


def is_training(stage: str) -> bool:
    """Tells whether a stage belongs to training: the reference's samples and the verdict do not."""
    return stage != "reference" and not stage.startswith("heldout/")
