"""CAID (arXiv 2505.19387, Algorithm 2): alternate a policy update that maximises the Lagrangian with dual descent.

Where the paper is silent, this is decided: the multipliers start at the one-shot optimum, so the literal step at t = 0 is left out;
one adapter is continued through all iterations, its optimizer and learning-rate schedule start anew in each; the reference stays the
original model; labels are drawn afresh in every step; the improvement is measured against each prompt's own reference samples; the dual
step is the inverse Hessian at the warm start with a cap on the change; the last iterate is the result, and no dual step follows it.
"""

from engine import dual, stages
from engine.config import CaidConfig
from engine.records import DualState


def train(config: CaidConfig, *, resume: str | None = None) -> stages.Result:
    """Run CAID; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with stages.open_job("caid", config, resume, n_stages=4 + 2 * config.iterations) as job:
        reference = stages.sample_reference(job)
        warm = stages.solve_dual(job, reference)
        adapter, lower = stages.start_policy(job, reference)
        state = DualState(lam_J=warm.lam)
        for t in range(1, config.iterations + 1):
            train_on, slack_on = stages.split_prompts(job, reference, config.slack_prompts, t)
            before = adapter.tensors()
            trained = stages.update_policy(job, reference, lower, state.lam_J, adapter, train_on=train_on, iteration=t)
            u = stages.measure_slack(
                job, reference, state.lam_J, adapter, trained.loss, slack_on=slack_on, n=config.slack_responses, iteration=t
            )
            if u.kl > config.max_kl:
                job.run.display.warn(f"KL {u.kl:.2f} nats passes --max-kl {config.max_kl}: stopped, the iterate before {t} is kept")
                adapter.set_tensors(before)
                break
            state = DualState(lam_J=state.lam_J, slack_J=u.slack_J, slack_se_J=u.se_J)
            if t < config.iterations:
                eta = config.dual_step or warm.hessian
                lam = dual.step(state.lam_J, u.slack_J, eta, max_change=config.lam_max_change, lam_max=config.lam_max)
                state = DualState(lam_J=lam)
        return stages.verdict(job, reference, adapter, state.lam_J)
