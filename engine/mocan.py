"""MoCAN (arXiv 2405.19544, Algorithm 1): solve the smooth dual once from reference samples, then align once at that lambda."""

from engine import stages
from engine.config import MocanConfig


def train(config: MocanConfig, *, resume: str | None = None) -> stages.Result:
    """Run MoCAN; returns the run folder, the held-out verdict and the multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with stages.open_job("mocan", config, resume, n_stages=5) as job:
        reference = stages.sample_reference(job)
        lam_J = stages.solve_dual(job, reference).lam
        adapter, lower = stages.start_policy(job, reference)
        everything = list(range(len(reference.prompts)))
        stages.update_policy(job, reference, lower, lam_J, adapter, train_on=everything, iteration=1)
        return stages.verdict(job, reference, adapter, lam_J)
