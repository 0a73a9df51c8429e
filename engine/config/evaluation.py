"""The settings of `engine.evaluate`."""

from dataclasses import dataclass, fields

from engine.config.bounds import LARGEST_SCORE, any_seed, bounded, check_bounds, count, one_of
from engine.errors import UserError

# The settings of --plan.
OF_PLANS = ("slack", "between", "cost_rate", "true_rate", "correlation")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Judge an iterate of a run on held-out prompts, with fresh responses of reference and policy."""

    plan: bool = False
    """Judge nothing, and say how many held-out prompts a verdict needs. RUN may be left out; where it is
    given, its reference samples tell how far scores spread."""
    slack: tuple[float, ...] = bounded((0.05, 0.1, 0.2, 0.4), above=0, at_most=LARGEST_SCORE)
    """With --plan: how far the policy goes beyond b, or a mean cost below its limit, in units."""
    between: float = bounded(0.0, at_least=0, at_most=LARGEST_SCORE)
    """With --plan: standard deviation of the improvement's true mean from prompt to prompt, in units."""
    cost_rate: tuple[float, ...] = bounded((), above=0, below=1)
    """With --plan and no RUN: limits on the share of unsafe responses, such as 0.02."""
    true_rate: float = bounded(0.0, at_least=0, below=1)
    """With --plan: the policy's true share of unsafe responses; 0 takes a third of the limit."""
    correlation: float = bounded(0.3, at_least=0, at_most=1)
    """With --plan and no RUN: correlation of unsafe responses to one prompt; at 1 all or none of them are."""
    iterate: int = count(0, at_least=0)
    """Iterate to judge; 0 takes the last one."""
    best_feasible: bool = False
    """First choose the iterate on the run's held-out prompts: the one with the most reward
    of those that meet every constraint there (none: the one that misses least).
    Then judge it on --prompts, which must be others."""
    prompts: str = ""
    """Prompts, in the forms of --prompts in training. Default: the run's held-out prompts."""
    profile: str = ""
    """Judge on sets of safe and unsafe prompts instead: safety, or a YAML file of your own sets."""
    n_prompts: int = count(0, at_least=0)
    """Prompts, at most: the run's seeded subset. 0 takes as many as the run's
    verdict, or all of --prompts. With --profile of each set, where 0 takes all."""
    n_responses: int = count(0, at_least=0)
    """Responses per prompt, of reference and policy each; 0 takes as many as the run's verdict."""
    seed: int = any_seed(1000)
    """Seed of the responses, far from usual seeds of runs so that they are fresh;
    the run's own seed draws its verdict's again."""
    audit: tuple[str, ...] = ()
    """Costs that are reported and were never optimised, besides the run's own audits.
    Same forms as in training."""
    confidence: float = bounded(
        0.95, above=0.5, below=1, says="must lie above 0.5 and below 1; 0.95 is usual"
    )
    """Confidence of the two-sided intervals, and of the one-sided bounds that decide met or not met."""
    allow_overlap: bool = False
    """Go on with prompts that are among the run's training prompts; --profile leaves these out without it."""
    accept_changes: bool = False
    """Go on with a scorer whose code or weights have changed since the run began."""
    require_met: bool = False
    """End with exit code 4 where the verdict on all constraints together is not "met"; everything is written
    as always."""
    out: str = ""
    """Folder of the results, must not exist yet. Default: RUN/evaluation-1 (with --profile: RUN/profile-1),
    or the next free number."""
    device: str = one_of("", "auto", "cpu", "cuda")
    """auto, cpu or cuda. Default: as in the run."""
    threads: int = bounded(0, at_least=0, at_most=1024)
    """CPU threads; 0 takes as many as the run asked for."""
    model_ranks: int = count(1)
    """Under torchrun: ranks that hold one model together, see python -m engine.train."""

    def check(self) -> None:
        """Refuses values that no evaluation can use.

        Raises: UserError naming the flag, its value and what is accepted.
        """
        check_bounds(self)
        self._check_plan()
        for name in ("n_prompts",) if self.profile else ("n_prompts", "n_responses"):
            if getattr(self, name) == 1:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} 1: must be at least 2, as one has no spread; 0 takes the default.")
        if self.profile and (self.prompts or self.best_feasible):
            other = "--prompts" if self.prompts else "--best-feasible"
            raise UserError(f"--profile {self.profile}: it has prompts of its own; leave {other} out.")
        if self.profile and self.require_met:
            raise UserError(
                f"--require-met: --profile {self.profile} compares sets and gives no verdict; leave one of "
                "the two out."
            )
        if self.best_feasible and (self.iterate or not self.prompts):
            raise UserError(
                "--best-feasible: chooses the iterate on the run's held-out prompts, so leave --iterate "
                "out and give other --prompts."
            )

    def _check_plan(self) -> None:
        """Refuses flags that a plan alone uses, or that a plan does not use."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        used = ("plan", "n_responses", "confidence", *OF_PLANS)
        wrong = [name for name in changed if (name not in used if self.plan else name in OF_PLANS)]
        if wrong:
            why = "has no use for it; leave it out" if self.plan else "alone uses it; add that"
            raise UserError(f"--{wrong[0].replace('_', '-')}: --plan {why}.")
