"""The settings that algorithms of a kind share: those that align once to pairs, and those that iterate."""

import math
from dataclasses import dataclass

from engine.config.bounds import bounded, count
from engine.config.run import FEW_PROMPTS, MOST_ITERATIONS, Draws, RunConfig
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairsConfig(RunConfig):
    """The settings of algorithms that align to pairs without sampling their policies."""

    pairs: str = "reference"
    """Whose responses a policy update learns from. reference: the reference's samples, on which the dual is
    solved. Or data in the forms of --prompts with two responses to each prompt: only its responses are taken,
    and the run's scorers score them."""
    epochs: int = count(0, at_least=0)
    """Passes of each policy update over the data of --pairs, in place of --steps; 0: --steps counts."""

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        if self.pairs == "policy":
            raise UserError(
                "--pairs policy: a one-shot method starts at the reference, whose samples are there "
                "already; use reference."
            )
        check_epochs(self)


def check_epochs(config: RunConfig) -> None:
    """Refuses passes over the pairs of no file. Raises: UserError."""
    if config.epochs and not config.pairs_file:
        raise UserError(
            f"--epochs {config.epochs}: it counts passes over data of --pairs, which is {config.pairs} "
            "here; give some, or --steps."
        )


@dataclass(frozen=True, kw_only=True)
class IterativeConfig(RunConfig):
    """The settings of algorithms that measure the slack of their policies and descend the dual."""

    iterations: int = bounded(5, at_least=1, at_most=MOST_ITERATIONS)
    """T: policies trained; a dual step stands between two of them."""
    slack_prompts: int = count(64, at_least=2, too_low=FEW_PROMPTS)
    """Prompts on which the slack is measured, never among the iteration's pairs;
    at most a third where prompts are few."""
    slack_responses: int = count(2)
    """Responses per prompt in the slack."""
    lam_max_change: float = bounded(2.0, above=1, at_most=1e9)
    """Largest factor by which a multiplier may change in one dual step."""
    max_kl: float = bounded(math.inf, above=0, at_most=1e9, infinite=True)
    """Stop when KL(policy || reference) passes this many nats per response, and keep the iterate before."""

    @property
    def policy_updates(self) -> int:
        """The number of times that the algorithm takes `steps` policy steps."""
        return self.iterations

    @property
    def measured_slacks(self) -> int:
        """The number of slacks that the algorithm measures."""
        return self.iterations

    @property
    def fresh_samples(self) -> tuple[Draws, ...]:
        """The responses sampled in training besides the reference's, those that measure slacks among them."""
        return (Draws(self.measured_slacks, self.slack_prompts, self.slack_responses),)

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        if self.truncated and self.max_kl < math.inf:
            raise UserError(
                f"--max-kl {self.max_kl:g}: no KL is measured with {self.cut_by}, as that cuts the "
                "distributions that are sampled; leave out one of them."
            )
        if self.slack_responses > self.n_responses:
            raise UserError(
                f"--slack-responses {self.slack_responses}: must be at most --n-responses {self.n_responses}."
            )
        if self.pairs_file and self.slack_prompts > self.n_prompts:
            raise UserError(
                f"--slack-prompts {self.slack_prompts}: must be at most --n-prompts {self.n_prompts}, as the "
                "slack is measured on prompts that the reference answers."
            )
        # The prompts of a file of pairs are others: those that measure the slack are left out of its rows.
        if not self.pairs_file and self.slack_prompts + self.prompts_per_step > self.n_prompts:
            raise UserError(
                f"--slack-prompts {self.slack_prompts}: slack and pairs need disjoint prompts, and "
                f"{self.n_prompts} prompts leave fewer than --prompts-per-step {self.prompts_per_step}; "
                "lower these or give more prompts."
            )
