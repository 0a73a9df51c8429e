"""MoCAN (arXiv 2405.19544, Algorithm 1): solve the smooth dual once from reference samples, then align once at that lambda."""

import torch

from engine import stages
from engine.config import MocanConfig


def train(config: MocanConfig, *, resume: str | None = None) -> stages.Result:
    """Run MoCAN; returns the run folder, the held-out verdict and the multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with stages.open_job("mocan", config, resume, n_stages=5) as job:
        world = stages.World(job)
        return world.verdict(loop(world))


def loop(world: stages.World) -> torch.Tensor:
    """Algorithm 1 in any world: returns the multipliers, float64 [J]."""
    lam_J = world.solve_dual().lam
    world.update_policy(lam_J, 1)
    return lam_J
