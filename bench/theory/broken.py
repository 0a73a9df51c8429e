"""Deliberate mistakes in the measured facts, which show that the bounds can fail."""

from collections.abc import Callable
from dataclasses import replace

from bench.theory.bounds import all_bounds
from bench.theory.exact_stages import ExactStages
from bench.theory.facts import Facts, Measured, Point, Stochastic
from bench.theory.measuring import UPDATES
from bench.theory.problem import make
from bench.theory.updates import maximiser
from engine import caid
from engine.config import CaidConfig


def _moved(f: Facts, name: str, **changes) -> Facts:
    return replace(f, **{name: replace(getattr(f, name), **changes)})


def _runs(f: Facts, change: Callable[[Stochastic], Stochastic]) -> Facts:
    return replace(f, stochastic=tuple(change(run) for run in f.stochastic))


def _policies(f: Facts, change: Callable[[Measured], Measured]) -> Facts:
    multi_shot = None if f.multi_shot is None else change(f.multi_shot)
    return replace(f, one_shot=change(f.one_shot), multi_shot=multi_shot)


def _half_gap(point: Point) -> Point:
    return replace(point, dual=point.dual_in_class + point.gap / 2)


# Each entry returns the same facts with one sign or factor wrong. Together they turn every
# statement red but those of `LOOSE`.
BROKEN: dict[str, Callable[[Facts], Facts]] = {
    "the KL's sign in P*": lambda f: replace(f, primal=f.primal + 2 * f.beta * f.kl),
    "the KL twice in P*": lambda f: replace(f, primal=f.primal - f.beta * f.kl),
    "P_p* without the KL's weight": lambda f: replace(f, primal_in_class=f.primal_in_class + f.beta * f.kl),
    "D_p* lower by a tenth of the gap": lambda f: _moved(
        f, "in_class", dual_in_class=f.in_class.dual_in_class - f.in_class.gap / 10
    ),
    "gap(lambda*_p) halved": lambda f: replace(f, in_class=_half_gap(f.in_class)),
    "gap(lambda*) doubled": lambda f: _moved(f, "star", dual_in_class=f.star.dual - 2 * f.star.gap),
    "the gap's sign at lambda*": lambda f: _moved(f, "star", dual_in_class=f.star.dual + f.star.gap),
    "mu*_D 1.5 times too large": lambda f: replace(f, mu=1.5 * f.mu),
    "lambda*_p 10 times too large": lambda f: _moved(f, "in_class", lam=10 * f.in_class.lam),
    "the factor 2 of Lemma 5 left out": lambda f: _moved(f, "off_along_h", bend=f.off_along_h.bend / 2),
    "policies that have not seen lambda": lambda f: _policies(
        f, lambda p: replace(p, value=f.untrained.value, slack=f.untrained.slack)
    ),
    "the KL's sign in the policies' value": lambda f: _policies(
        f, lambda p: replace(p, value=p.value + 2 * f.beta * f.kl)
    ),
    "the dual step's sign, which keeps lambda at 0": lambda f: _runs(
        f, lambda run: replace(run, best=f.others[0])
    ),
    "the gap of the runs' best iterate halved": lambda f: _runs(
        f, lambda run: replace(run, best=_half_gap(run.best))
    ),
    "the sign of D": lambda f: replace(f, chord=-f.chord),
    "the Hessian weighted by pi / reference": lambda f: replace(f, L=10 * f.L),
    "the gradient's sign in CAN's expansion": lambda f: replace(f, taylor=f.taylor_of_wrong_sign),
    "a tenth of CAN's dual step": lambda f: _moved(
        f, "descent", steps=10 * f.descent.steps, steps_as_printed=10 * f.descent.steps_as_printed
    ),
}

# B is so wide in these statements that no break above reaches it: they cannot fail.
LOOSE = (
    "Thm 2: D_p* - P* <= B(lambda*_nu)", "Lemma 3: D - D_p <= B", "Thm 1: D_p* - P_p* <= B(lambda*_nu)",
    "Lemma 5 with B", "Thm 3, U-OPT", "Thm 3, R-OPT", "Thm 4, U-OPT", "Thm 4, R-OPT",
    "Thm 4, R-OPT, with |lambda*|_1",
    *(f"Thm {name}, {kind}" for kind in UPDATES for name in ("5, upper side", "6, U-OPT", "6, R-OPT")),
)  # fmt: skip


def reds(right: Facts, wrong: Facts) -> list[str]:
    """Names the bounds that hold with the right facts and not with the wrong ones."""
    held = {(b.name, b.form) for b in all_bounds(right) if b.holds}
    return list(dict.fromkeys(b.name for b in all_bounds(wrong) if (b.name, b.form) in held and not b.holds))


def flipped_sign_of_the_slack(seed: int) -> tuple[float, float]:
    """Returns |slack| after 12 iterations of CAID from 3 lambda*, and the same where the world returns the
    slack with the wrong sign."""
    problem = make(seed, eps=0.1)
    config = CaidConfig(beta=problem.beta, iterations=12, dual_step=1.0)
    ends = []
    for world_class in (ExactStages, _FlippedStages):
        world = world_class(problem, config, maximiser)
        world.lam_init = 3 * world.solve_dual().lam
        caid.loop(world, config)
        ends.append(float(world.history[-1].slack_J.abs().max()))
    return ends[0], ends[1]


class _FlippedStages(ExactStages):
    """An exact world that returns the slack with the wrong sign."""

    def measure_slack(self, theta, lam_J, iteration):
        slack = super().measure_slack(theta, lam_J, iteration)
        return replace(slack, slack_J=-slack.slack_J)
