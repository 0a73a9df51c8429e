"""Stage iteration-t/slack: the line that says what was measured."""

from torch import Tensor

from engine.run.rows import read_timing
from engine.stages.job import Job
from engine.stages.protocol import Slack
from engine.stages.reference import Reference
from engine.stages.solve import listed


def iteration_line(job: Job, reference: Reference, lam_J: Tensor, slack: Slack, loss: float, iteration: int) -> str:
    stage = f"iteration-{iteration}/slack"
    speed = [row["tokens_per_s"] for row in read_timing(job.run.folder) if row["stage"] == stage and "tokens_per_s" in row]
    measured = zip(slack.improvement_J.tolist(), slack.se_J.tolist(), reference.needed_J.tolist(), reference.aimed, strict=True)
    held = [
        limit.progress(*values, reference.units.utility_J[j])
        for j, (limit, values) in enumerate(zip(reference.limits, measured, strict=True))
    ]
    parts = [
        f"iteration {iteration}: lambda {listed(lam_J)}", f"reward {slack.reward:+.2f} +- {slack.reward_se:.2f}", *held,
        f"KL {slack.kl:.2f} +- {slack.kl_se:.2f} nats", f"loss {loss:.3f}", *(f"{x:.0f} tokens/s" for x in speed[-1:]),
    ]  # fmt: skip
    return " | ".join(parts)
