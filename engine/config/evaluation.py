"""The settings of `engine.evaluate`."""

from dataclasses import dataclass

from engine.config.bounds import any_seed, bounded, check_bounds, count, one_of
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Judge an iterate of a run on held-out prompts, with fresh responses of reference and policy."""

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
    out: str = ""
    """Folder of the results, must not exist yet. Default: RUN/evaluation-1 (with --profile: RUN/profile-1),
    or the next free number."""
    device: str = one_of("", "auto", "cpu", "cuda")
    """auto, cpu or cuda. Default: as in the run."""
    threads: int = bounded(0, at_least=0, at_most=1024)
    """CPU threads; 0 takes as many as the run asked for."""

    def check(self) -> None:
        """Refuses values that no evaluation can use.

        Raises: UserError naming the flag, its value and what is accepted.
        """
        check_bounds(self)
        for name in ("n_prompts",) if self.profile else ("n_prompts", "n_responses"):
            if getattr(self, name) == 1:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} 1: must be at least 2, as one has no spread; 0 takes the default.")
        if self.profile and (self.prompts or self.best_feasible):
            other = "--prompts" if self.prompts else "--best-feasible"
            raise UserError(f"--profile {self.profile}: it has prompts of its own; leave {other} out.")
        if self.best_feasible and (self.iterate or not self.prompts):
            raise UserError(
                "--best-feasible: chooses the iterate on the run's held-out prompts, so leave --iterate "
                "out and give other --prompts."
            )
