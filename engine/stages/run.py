"""The stages of a run on a real model, as the algorithms call them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from engine import dual
from engine.config import RunConfig
from engine.policy.samples import Samples
from engine.policy.steps import Policy
from engine.policy.weights import Weights, new_weights
from engine.ranks import ALONE, Ranks
from engine.records import ScoreRule, Target
from engine.run import outputs
from engine.stages import preference, slack
from engine.stages.job import Job, open_job
from engine.stages.protocol import Result, Slack
from engine.stages.reference import Reference, sample_reference
from engine.stages.sampling import gap_of
from engine.stages.solve import one_shot, solve_dual
from engine.stages.update import Updates, score_pairs
from engine.stages.verdict import Look, give_verdict, sample_heldout


@contextmanager
def open_stages(
    algorithm: str, config: RunConfig, resume: str | None, ranks: Ranks = ALONE
) -> Iterator["RunStages"]:
    """Opens a run for an algorithm, or goes on with one, see `open_job`.
    Raises: UserError before any compute is spent."""
    with open_job(algorithm, config, resume, ranks=ranks) as job:
        yield RunStages(job)


class RunStages:
    """`engine.stages.protocol.Stages` on a real model: an iterate is a `Policy`, None the reference."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reference: Reference
        self.updates: Updates
        self._kept: tuple[Policy | None, Tensor] | None = None

    @property
    def n_constraints(self) -> int:
        return len(self.job.scorers.costs)

    @property
    def kept(self) -> tuple[Policy | None, Tensor]:
        assert self._kept is not None, "an iterate is kept when its slack is measured"
        return self._kept

    def sample_reference(self) -> None:
        job = self.job
        self.reference = sample_reference(job)
        pairs = None if job.pairs is None else score_pairs(job)
        if job.config.by_preference:
            self.reference = preference.align(job, self.reference)
        self.updates = Updates(job, self.reference, new_weights(job.model, job.config), pairs)

    def solve_dual(self) -> dual.Solution:
        return solve_dual(self.job, self.reference)

    def check_thresholds(self) -> None:
        if not self.job.config.force:
            one_shot(self.job, self.reference)

    def fit(self, target: Target, iteration: int) -> Policy:
        return self.updates.fit(target, iteration)

    def ascend(self, start: Policy | None, lam_J: Tensor, score: ScoreRule, iteration: int) -> Policy:
        return self.updates.ascend(start, lam_J, score, iteration)

    def adopt(self, policy: Policy, lam_J: Tensor, iteration: int) -> Policy:
        return self.updates.adopt(policy, lam_J, iteration)

    def measure_slack(self, policy: Policy, lam_J: Tensor, iteration: int) -> Slack | None:
        job, max_kl = self.job, self.job.config.max_kl
        if self._kept is None:
            self.keep(None, lam_J)
        self.updates.hold(policy)
        known = self.updates.slack_answers.pop(iteration, None)
        measured = slack.measure(job, self.reference, self.updates.weights, policy, lam_J, iteration, known)
        self._say_gap(slack.stage_name(iteration))
        if job.ranks.is_first:
            slack.say(job, self.reference, lam_J, measured, policy.loss, iteration)
        if measured.kl > max_kl:
            job.ranks.first(lambda: self._put_aside(iteration))
            job.run.display.warn(
                f"iteration {iteration}: KL {measured.kl:.2f} nats passes --max-kl {max_kl}; "
                "stopped, and the iterate before it is kept"
            )
            return None
        self.keep(policy, lam_J)
        return measured

    def keep(self, policy: Policy | None, lam_J: Tensor) -> None:
        self._kept = policy, lam_J

    def verdict(self, policy: Policy | None, lam_J: Tensor) -> Result:
        def side(name: str, look: Look) -> Samples:
            """Samples for a look; as "policy" the reference, None, answers with random numbers of its own."""
            if name == "reference":
                return self.heldout(look)
            self.updates.hold(policy)
            return self.heldout(look, self.updates.weights)

        return give_verdict(self.job, self.reference, policy, side, lam_J)

    def heldout(self, look: Look, weights: Weights | None = None) -> Samples:
        """Runs the stage of a look, of the reference (None) or of weights; says its log-prob gap."""
        samples = sample_heldout(self.job, self.reference, weights, look)
        self._say_gap(look.stage("reference" if weights is None else "policy"))
        return samples

    def _put_aside(self, iteration: int) -> None:
        paths = self.job.run.paths
        shutil.rmtree(paths.rejected(iteration), ignore_errors=True)
        paths.iterate(iteration).rename(paths.rejected(iteration))
        outputs.note(paths, [paths.rejected(iteration)])

    def _say_gap(self, stage: str) -> None:
        if gap := gap_of(self.job.run, stage):
            self.job.run.display.line(f"{stage}: {gap}")
