"""What a trust region, a least weight and a mean over steps do for policies of few steps, where every
response is listed.

    python -m bench.theory.few_steps          (four minutes)

CAID's loop with AdamW on pairs, as on a real model: 8 responses drawn to each of 80 prompts, five updates of
five steps with 16 prompts each or three of eight, a class of reward, utility and 30 features that mean
nothing. `reach` is how far a step takes a policy: the standard deviation of the features, at a learning rate
of 1.5e-3. Tails are those of the utility. KL, slack and objective at the end are exact; the tilt is the exact
one at the last lambda. What a policy lacks is counted at the exact multiplier lambda*: the Lagrangian of the
best policy less its own, which is beta KL(policy || best policy).
"""

import math
import statistics
from dataclasses import replace
from itertools import product

import torch

from bench.theory.exact_stages import ExactStages
from bench.theory.optima import Optima
from bench.theory.problem import Problem, make
from engine import caid, dual
from engine.config import CaidConfig
from engine.policy.pairs import within_prompts
from engine.records import ScoredTarget

PROMPTS, RESPONSES, DRAWS, NOISE, SEEDS = 80, 60, 8, 30, 20
REACHES, TAILS = (1.0, 3.0, 10.0), ("normal", "heavy")
# The length of a step here, for the learning rate there.
LENGTH = 0.05 / 1.5e-3
USUAL = {"adam_beta1": 0.9, "weight_average": 0.0}
THREE = {"iterations": 3, "steps": 8, "weight_average": 0.9}
RULES = {
    "as in the papers": {"max_kl_ratio": math.inf, "least_weight": 0.0, "dual_rule": "newton", **USUAL},
    "least weight 0.01": {"max_kl_ratio": math.inf, **USUAL},
    "1.5 times the tilt's KL": {"max_kl_ratio": 1.5, "least_weight": 0.0, **USUAL},
    "2 times": {"max_kl_ratio": 2.0, "least_weight": 0.0, **USUAL},
    "3 times": {"max_kl_ratio": 3.0, "least_weight": 0.0, **USUAL},
    "2 times, least weight 0.01": USUAL,
    "the same, beta1 0.5": {"weight_average": 0.0},
    "the same, mean of 0.8": {"adam_beta1": 0.9},
    "the same, beta1 0.5, mean of 0.5": {"weight_average": 0.5},
    "the same, beta1 0.5, mean of 0.8": {},
    "the same, beta1 0.5, mean of 0.9": {"weight_average": 0.9},
    "the same, beta1 0.5, cosine": {"weight_average": 0.0, "schedule": "cosine"},
    "three of eight steps, beta1 0.5, mean of 0.9": THREE,
    "the same, a third longer steps": {**THREE, "learning_rate": 2e-3},
    "the same, a whole Newton step": {**THREE, "learning_rate": 2e-3, "dual_step": 1.0},
}


class FewSteps:
    """An update (`bench.theory.exact_stages.Update`) by AdamW on the two ends of some prompts, with the
    engine's trust region; its moments, its mean and its pace go on from update to update."""

    def __init__(self, features: int, config: CaidConfig) -> None:
        self.theta = torch.nn.Parameter(torch.zeros(features, dtype=torch.float64))
        betas = config.adam_beta1, 0.99
        self.rate = LENGTH * config.learning_rate
        self.optimizer = torch.optim.AdamW([self.theta], lr=self.rate, betas=betas, weight_decay=0.0)
        # Of theta after each step, with weights that sum to `weight`.
        self.total, self.weight, self.pace = torch.zeros_like(self.theta.data), 0.0, 1.0

    def __call__(self, world: ExactStages, target: ScoredTarget, number: int) -> torch.Tensor:
        config, features_PGF = world.config, world.gather(world.problem.features_PYF)
        generator, bounded = world.generator(number), target.bounded(config.least_weight)
        score_R = bounded.score_PG.reshape(-1)
        for step in range(config.steps):
            factor = 1.0
            if config.schedule == "cosine":
                factor = (1 + math.cos(math.pi * step / config.steps)) / 2
            self.optimizer.param_groups[0]["lr"] = self.pace * self.rate * factor
            chosen = torch.randperm(PROMPTS, generator=generator)[: config.prompts_per_step].tolist()
            pairs = within_prompts(bounded.score_PG, chosen, 2)
            rows = torch.tensor(pairs.row)
            self.optimizer.zero_grad()
            moved_N = target.coefficient * features_PGF.flatten(0, 1)[rows] @ self.theta
            # Regression labels: margins against score differences.
            a, b = pairs.pairs.unbind(1)
            missed_N = moved_N - score_R[rows]
            ((missed_N[a] - missed_N[b]).square().mean() / 2).backward()
            torch.nn.utils.clip_grad_norm_([self.theta], config.clip_norm)
            self.optimizer.step()
            self.total = config.weight_average * self.total + self.theta.detach()
            self.weight = config.weight_average * self.weight + 1
        limit = config.max_kl_ratio * dual.tilt_kl(target.score_PG, target.coefficient)
        with torch.no_grad():
            while (kl := world.problem.kl(self.total / self.weight)) > limit:
                share = min(math.sqrt(limit / kl), 0.95)
                self.theta.mul_(share)
                self.total *= share
                self.pace *= share
        return self.total / self.weight


def problem(seed: int, reach: float, tails: str) -> Problem:
    """Makes a problem: `bench.theory.problem.make`, with further features, and outliers among the bad answers
    where tails are heavy, by which the unit of the utility is measured too."""
    found = make(seed, P=PROMPTS, Y=RESPONSES, b=0.4)
    generator = torch.Generator().manual_seed(seed)
    utility_PYJ = found.utility_PYJ
    if tails == "heavy":
        bad = torch.rand(utility_PYJ.shape, generator=generator, dtype=torch.float64) < 0.01
        utility_PYJ = utility_PYJ - 15 * bad
        utility_PYJ = utility_PYJ / utility_PYJ.var(1, correction=0).mean(0).sqrt()
    noise = torch.randn(PROMPTS, RESPONSES, NOISE, generator=generator, dtype=torch.float64)
    features_PYF = reach * torch.cat((found.reward_PY[..., None], utility_PYJ, noise), dim=2)
    return replace(found, utility_PYJ=utility_PYJ, features_PYF=features_PYF)


def measure(seed: int, reach: float, tails: str, rule: dict) -> tuple[float, float, float, float]:
    """Runs CAID; returns its policy's KL over the exact tilt's at the last lambda, slack, objective
    E r - beta KL, and what it lacks."""
    here = problem(seed, reach, tails)
    config = CaidConfig(beta=1.0, **rule)
    update = FewSteps(here.features_PYF.shape[2], config)
    world = ExactStages(here, config, update, draws=DRAWS, slack_draws=config.slack_responses, seed=seed)
    theta, lam_J = caid.loop(world, config)
    log_w = (here.reward_PY + here.utility_PYJ @ lam_J).log_softmax(1)
    tilt_kl = float((log_w.exp() * (log_w + math.log(RESPONSES))).sum(1).mean())
    optima = Optima(here)
    best_J = optima.solve_dual()
    lacks = optima.dual(best_J) - here.lagrangian(theta, torch.from_numpy(best_J))
    return here.kl(theta) / tilt_kl, float(here.slack_J(theta)[0]), here.value(theta), lacks


def main() -> None:
    """Prints the table."""
    print("| reach | tails | rule | KL over the tilt's: median, worst | slack, rms | E r - KL | lacks |")
    print("|---|---|---|---|---|---|---|")
    for reach, tails, (name, rule) in product(REACHES, TAILS, RULES.items()):
        found = (measure(s, reach, tails, rule) for s in range(SEEDS))
        ratio, slack, value, lacks = zip(*found, strict=True)
        error = statistics.stdev(lacks) / math.sqrt(SEEDS)
        rms = math.sqrt(statistics.fmean(x * x for x in slack))
        print(
            f"| {reach:g} | {tails} | {name} | {statistics.median(ratio):.2f}, {max(ratio):.2f} | "
            f"{rms:.2f} | {statistics.fmean(value):+.2f} | {statistics.fmean(lacks):.2f} +- {error:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
