"""A whole row of each kind for run folders written by hand; a test replaces the fields that it is about."""

from collections.abc import Iterable
from pathlib import Path

from engine.run.folder import RunFolder
from engine.run.rows import DualRow, IterationRow, PairStepRow, PolicyRow, ReferenceRow, Row, SpeedRow
from tests.helpers.runs import write

REFERENCE = ReferenceRow(
    stage="reference",
    names=["harm"],
    audit_names=["harm-audit"],
    reward_sd=1.25,
    utility_sd=[0.5],
    audit_sd=[0.75],
    correlation=[-0.4],
    finished=0.9,
    mean_length=40.0,
    prompts=8,
    responses=4,
    needed=[0.3],
    aimed=[0.5],
    aim=[0.5],
    margin=3.3,
    worst_above=[None],
)

DUAL = DualRow(
    stage="dual",
    lam=[1.0],
    lam_low=[0.5],
    lam_high=[1.5],
    lam_corrected=[0.9],
    lam_se=[0.25],
    predicted_improvement=[0.5],
    predicted_improvement_se=[0.05],
    improvement_at_zero=[-0.2],
    ess=3.0,
    kkt=1e-9,
    aim=[0.5],
    threshold=[0.3],
)

STEP = PairStepRow(
    stage="iteration-1/policy",
    iteration=1,
    step=1,
    loss=0.7,
    grad_norm=0.5,
    learning_rate=1e-3,
    accuracy=0.6,
    margin=0.1,
    pairs=12,
)

POLICY = PolicyRow(stage="iteration-1/policy", iteration=1, lam=[1.0], loss=0.6, tilt_kl=0.5)

ITERATION = IterationRow(
    stage="iteration-1/slack",
    iteration=1,
    lam=[1.0],
    reward=0.2,
    reward_se=0.05,
    improvement=[0.4],
    improvement_se=[0.06],
    threshold=[0.3],
    aim=[0.5],
    slack=[-0.1],
    slack_se=[0.06],
    kl=1.5,
    kl_se=0.2,
    loss=0.6,
    finished=0.9,
    prompts=8,
    responses=4,
)

SPEED = SpeedRow(
    stage="iteration-1/slack",
    tokens=70,
    sampling_s=2.0,
    scoring_s=1.0,
    tokens_per_s=35.0,
    scored_tokens_per_s=70.0,
)


def write_metrics(folder: Path, rows: Iterable[Row]) -> None:
    """Writes the rows to metrics.jsonl of a run folder."""
    write(RunFolder(folder).metrics, [row.as_dict() for row in rows])


def write_timing(folder: Path, rows: Iterable[Row]) -> None:
    """Writes the rows to timing.jsonl of a run folder."""
    write(RunFolder(folder).timing, [row.as_dict() for row in rows])
