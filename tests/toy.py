"""An enumerated world: every response is listed, the policy is a table, expectations are exact. It stands in for `engine.stages.World`.

A response is one token, the prompt's hidden state is a unit vector and the head is the table of logits, so the real loss op trains it.
"""

from dataclasses import replace

import torch

from engine import dual
from engine.records import Scores
from engine.stages import Slack
from kernels import lagrangian_preference_loss


class EnumeratedWorld:
    """P prompts x Y equally likely responses (the uniform reference), rewards [P, Y], utilities [P, Y, J], thresholds b [J]."""

    def __init__(self, P, Y, J, b, beta, seed, lam_init=None):
        generator = torch.Generator().manual_seed(seed)
        self.reward_PY = torch.randn(P, Y, generator=generator, dtype=torch.float64)
        self.utility_PYJ = torch.randn(P, Y, J, generator=generator, dtype=torch.float64) - 0.5 * self.reward_PY[..., None]
        self.b_J, self.beta, self.lam_init = torch.as_tensor(b, dtype=torch.float64), beta, lam_init
        self.history = []

    def solve_dual(self):
        solution = dual.solve(self.reward_PY, self.utility_PYJ, self.b_J, self.beta, enumerated=True)
        return solution if self.lam_init is None else replace(solution, lam=torch.as_tensor(self.lam_init, dtype=torch.float64))

    @property
    def scores(self):
        P, Y = self.reward_PY.shape
        reference = torch.full((P, Y), -float(torch.tensor(Y).double().log()), dtype=torch.float64)
        return Scores(reward_PG=self.reward_PY, utility_PGJ=self.utility_PYJ, audit_PGA=self.utility_PYJ[..., :0], ref_logprob_PG=reference)

    def fit(self, target, iteration):
        """The population minimiser of the preference loss over all pairs, by L-BFGS on the real op in float64: a table [Y, P]."""
        P, Y = self.reward_PY.shape
        upper = torch.triu_indices(Y, Y, 1).t()
        pairs = torch.cat([upper + p * Y for p in range(P)])
        hidden = torch.eye(P, dtype=torch.float64).repeat_interleave(Y, dim=0)
        indices, cu = torch.arange(Y).repeat(P), torch.arange(P * Y + 1)
        start = torch.zeros(Y, P, dtype=torch.float64) if target.start is None else target.start
        table = start.clone().requires_grad_()
        reference = self.scores.ref_logprob_PG
        if target.anchor is not None:
            reference = torch.lerp(reference, self.logprob_PY(target.anchor), target.anchor_share)
        score = target.score_PG.reshape(-1)
        optimizer = torch.optim.LBFGS([table], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            result = lagrangian_preference_loss(
                hidden, table, indices, cu, pairs, score, score.new_zeros(P * Y, 0), score.new_zeros(0), reference.reshape(-1),
                beta=target.coefficient,
            )  # fmt: skip
            loss = result.loss * P  # keeps the gradient's size away from the tolerance
            loss.backward()
            return loss

        optimizer.step(closure)
        return table.detach()

    def logprob_PY(self, table):
        return torch.log_softmax(table.t(), dim=1)

    def policy_PY(self, table):
        return self.logprob_PY(table).exp()

    def measure_slack(self, table, lam_J, iteration):
        gain_PJ = (self.policy_PY(table)[..., None] * self.utility_PYJ).sum(1) - self.utility_PYJ.mean(1)
        slack = gain_PJ.mean(0) - self.b_J
        self.history.append((lam_J, slack))
        return Slack(
            improvement_J=gain_PJ.mean(0), se_J=slack * 0, slack_J=slack, violation_J=(self.b_J - gain_PJ).clamp(min=0).mean(0),
            reward=0.0, reward_se=0.0, kl=0.0,
        )  # fmt: skip

    def passes_max_kl(self, slack, iteration):
        return False
