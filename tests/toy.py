"""An enumerated world: every response is listed, the policy is a table, expectations are exact. It stands in for `engine.stages.World`.

A response is one token, the prompt's hidden state is a unit vector and the head is the table of logits, so the real loss op trains it.
"""

from dataclasses import replace

import torch

from engine import dual
from engine.stages import Slack
from kernels import lagrangian_preference_loss


class EnumeratedWorld:
    """P prompts x Y equally likely responses (the uniform reference), rewards [P, Y], utilities [P, Y, J], thresholds b [J]."""

    def __init__(self, P, Y, J, b, beta, seed, lam_init=None):
        generator = torch.Generator().manual_seed(seed)
        self.reward_PY = torch.randn(P, Y, generator=generator, dtype=torch.float64)
        self.utility_PYJ = torch.randn(P, Y, J, generator=generator, dtype=torch.float64) - 0.5 * self.reward_PY[..., None]
        self.b_J, self.beta, self.lam_init = torch.as_tensor(b, dtype=torch.float64), beta, lam_init
        self.table_YP = torch.zeros(Y, P, dtype=torch.float64)
        self.history = []

    def solve_dual(self):
        solution = dual.solve(self.reward_PY, self.utility_PYJ, self.b_J, self.beta, enumerated=True)
        return solution if self.lam_init is None else replace(solution, lam=torch.as_tensor(self.lam_init, dtype=torch.float64))

    def update_policy(self, lam_J, iteration, n_slack=0):
        """The population minimiser of the preference loss over all pairs, by L-BFGS on the real op in float64."""
        P, Y = self.reward_PY.shape
        upper = torch.triu_indices(Y, Y, 1).t()
        pairs = torch.cat([upper + p * Y for p in range(P)])
        hidden = torch.eye(P, dtype=torch.float64).repeat_interleave(Y, dim=0)
        target, cu = torch.arange(Y).repeat(P), torch.arange(P * Y + 1)
        table = self.table_YP.clone().requires_grad_()
        reference = torch.full((P * Y,), -float(torch.tensor(Y).double().log()), dtype=torch.float64)
        optimizer = torch.optim.LBFGS([table], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            result = lagrangian_preference_loss(
                hidden, table, target, cu, pairs, self.reward_PY.reshape(-1), self.utility_PYJ.reshape(P * Y, -1), lam_J, reference,
                beta=self.beta,
            )  # fmt: skip
            loss = result.loss * P  # keeps the gradient's size away from the tolerance
            loss.backward()
            return loss

        optimizer.step(closure)
        self.table_YP = table.detach()

    def policy_PY(self):
        return torch.softmax(self.table_YP.t(), dim=1)

    def measure_slack(self, lam_J, iteration):
        mean = (self.policy_PY()[..., None] * self.utility_PYJ).sum(1).mean(0) - self.utility_PYJ.mean((0, 1))
        self.history.append((lam_J, mean - self.b_J))
        return Slack(improvement_J=mean, se_J=mean * 0, slack_J=mean - self.b_J, reward=0.0, reward_se=0.0, kl=0.0)

    def passes_max_kl(self, slack, iteration):
        return False
