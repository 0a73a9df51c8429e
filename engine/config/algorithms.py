"""The settings of each algorithm, and the table of all algorithms.

An algorithm has one flat frozen dataclass. Every field is a command-line flag, and the docstring under it is
the flag's help text, with the unit. A new algorithm is its file, its class here and its row in `ALGORITHMS`.
"""

from dataclasses import dataclass, fields
from importlib import import_module
from typing import NamedTuple

from engine.config.bounds import bounded, count, one_of
from engine.config.kinds import IterativeConfig, PairsConfig, check_epochs
from engine.config.run import MOST_STEPS, Draws, RunConfig
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CaidConfig(IterativeConfig):
    """CAID: alternate policy updates with dual descent (arXiv 2505.19387, Algorithm 2)."""

    scores: str = one_of("model", "preference")
    """model: reward and utilities are what the scorers say (MoCAID). preference: they are log-ratios of
    policies aligned to preferences (PeCAID, Algorithm 3)."""
    preferences: str = ""
    """With --scores preference: data in the forms of --prompts with two responses to each prompt, and labels
    in the columns reward and one per cost: 0 or 1, the number of the response that is better in that respect.
    Default: labels drawn from the scorers on reference samples."""
    preference_columns: tuple[str, ...] = ()
    """Columns of the labels in --preferences, the reward's first and then one per cost; NAME=-COLUMN turns
    one. Where each response has a row of its own, these are its scores. Default: reward and the costs'
    names, or those of PKU-SafeRLHF."""
    preference_steps: int = bounded(10, at_least=1, at_most=MOST_STEPS)
    """With --scores preference: DPO steps of each policy that is aligned to preferences."""
    pairs: str = "reference"
    """Whose responses a policy update learns from. reference: the samples that the dual is solved on. policy:
    fresh samples of the last iterate. Or data in the forms of --prompts with two responses to
    each prompt: only its responses are taken, and the run's scorers score them."""
    epochs: int = count(0, at_least=0)
    """Passes of each policy update over the data of --pairs, in place of --steps; 0: --steps counts."""
    dual_rule: str = one_of("guarded", "newton", "secant", "optimistic", "bisection")
    """The step of the multipliers. newton: as --dual-step says. guarded: the same, but a multiplier that a
    surplus has lowered into a shortfall goes back as far as the two slacks say, and steps less from then on.
    secant: the curvature corrected by the measured slacks wherever they tell more than noise. optimistic:
    newton on a forecast of the slack. bisection: for one multiplier, by the sign of the slack. In all of them
    a slack within one standard error counts as 0."""
    dual_step: float = bounded(0.5, above=0, at_most=1e6)
    """Step of the dual descent, as a share of the Newton step (inverse Hessian at the warm start times
    slack); below 1, as a policy of few steps lags behind lambda."""

    solves_dual = True

    @property
    def fresh_samples(self) -> tuple[Draws, ...]:
        """The responses sampled in training: for slacks and, with --pairs policy,
        for every update but the first."""
        if self.pairs != "policy":
            return super().fresh_samples
        learned = Draws(self.iterations - 1, self.steps * self.prompts_per_step, self.n_responses)
        return (*super().fresh_samples, learned)

    @property
    def by_preference(self) -> bool:
        """Tells whether scores are log-ratios of policies that are aligned to preferences."""
        return self.scores == "preference"

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        check_epochs(self)
        if self.dual_rule == "bisection" and len(self.cost) > 1:
            raise UserError(
                f"--dual-rule bisection: {len(self.cost)} costs; it takes one, use newton or secant."
            )
        if self.preferences and not self.by_preference:
            raise UserError(
                f"--preferences {self.preferences}: scores are those of models here; add --scores "
                "preference, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class MocanConfig(PairsConfig):
    """MoCAN: solve the dual once, then align once (arXiv 2405.19544, Algorithm 1)."""

    steps: int = 25
    """Policy steps in all."""

    solves_dual = True


@dataclass(frozen=True, kw_only=True)
class PecanConfig(MocanConfig):
    """PeCAN: MoCAN on log-ratios of policies aligned to preferences (arXiv 2405.19544, Algorithm 2)."""

    preferences: str = ""
    """Data in the forms of --prompts with two responses to each prompt, and labels in the columns reward and
    one per cost: 0 or 1, the number of the response that is better in that respect. Default: labels drawn
    from the scorers on reference samples."""
    preference_columns: tuple[str, ...] = ()
    """Columns of the labels in --preferences, the reward's first and then one per cost; NAME=-COLUMN turns
    one. Where each response has a row of its own, these are its scores. Default: reward and the costs'
    names, or those of PKU-SafeRLHF."""
    preference_steps: int = bounded(10, at_least=1, at_most=MOST_STEPS)
    """DPO steps of each policy that is aligned to preferences."""

    @property
    def by_preference(self) -> bool:
        """Tells that scores are always log-ratios of policies that are aligned to preferences."""
        return True


@dataclass(frozen=True, kw_only=True)
class DpoConfig(PairsConfig):
    """Plain DPO on one score, without a constraint (arXiv 2305.18290): the two ends of every trade-off."""

    objective: str = one_of("reward", "safety")
    """reward, or safety: the sum of the utilities."""
    labels: str = "soft"
    steps: int = 25
    """Policy steps in all."""

    has_thresholds = False


@dataclass(frozen=True, kw_only=True)
class SacpoConfig(PairsConfig):
    """SACPO: align to the reward, then to safety with the first policy as
    the reference (arXiv 2404.11049)."""

    lam: tuple[float, ...] = bounded((1.0,), above=0, at_most=1e9)
    """Fixed multiplier of each utility; the second stage's coefficient is beta / lambda. The paper tries
    several, none is solved for."""
    steps: int = 12
    """Policy steps of each of the two stages."""
    labels: str = "soft"

    has_thresholds = False

    @property
    def policy_updates(self) -> int:
        """The number of times that `steps` policy steps are taken:
        once in each of the algorithm's two stages."""
        return 2

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        _refuse_single(self)
        if len(self.lam) != len(self.cost):
            raise UserError(
                f"--lam {' '.join(map(str, self.lam))}: give one value for each of the "
                f"{len(self.cost)} cost(s)."
            )


@dataclass(frozen=True, kw_only=True)
class SafeDpoConfig(PairsConfig):
    """SafeDPO: DPO in which a safe response always wins over an unsafe one (arXiv 2505.20065)."""

    offset: float = bounded(10.0, at_least=0, at_most=1e6)
    """Margin by which a safe response has to lead an unsafe one, nats x beta."""
    labels: str = "soft"
    steps: int = 25
    """Policy steps in all."""

    has_thresholds = False

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        if self.labels not in ("soft", "sampled", "sampled-once"):
            raise UserError(
                f"--labels {self.labels}: safe responses win by labels here; use soft, sampled or "
                "sampled-once."
            )


@dataclass(frozen=True, kw_only=True)
class CdpoConfig(IterativeConfig):
    """Our reading of C-DPO (arXiv 2403.02475): DPO anew at each multiplier, then a step
    of dual descent of constant size."""

    labels: str = "soft"
    lam_init: float = bounded(1.0, at_least=0, at_most=1e9)
    """First value of every multiplier."""
    dual_rate: float = bounded(1.0, above=0, at_most=1e9)
    """Step of the dual descent: change of lambda per unit of slack."""


@dataclass(frozen=True, kw_only=True)
class PdDpoConfig(IterativeConfig):
    """Our reading of PD-DPO (arXiv 2510.05703): DPO on the reward once, then DPO on safety
    from it at each multiplier."""

    labels: str = "soft"
    lam_init: float = bounded(1.0, at_least=0, at_most=1e9)
    """First value of every multiplier."""
    dual_rate: float = bounded(1.0, above=0, at_most=1e9)
    """Step of the dual descent: change of lambda per unit of slack."""

    @property
    def policy_updates(self) -> int:
        """The number of times that `steps` policy steps are taken: once on the reward,
        then once in each iteration."""
        return 1 + self.iterations

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        _refuse_single(self)


@dataclass(frozen=True, kw_only=True)
class OpdConfig(IterativeConfig):
    """Our reading of OPD (arXiv 2602.22146): optimistic (predictive) proximal steps of policy and
    multipliers, last iterate."""

    lam_init: float = bounded(1.0, at_least=0, at_most=1e9)
    """First value of every multiplier."""
    dual_rate: float = bounded(0.5, above=0, at_most=1e9)
    """Step of the dual descent: change of lambda per unit of slack."""
    proximity: float = bounded(1.0, above=0, at_most=1e9)
    """Weight of KL(policy || last policy) in a proximal step, in --units of the reward."""

    @property
    def policy_updates(self) -> int:
        """The number of times that `steps` policy steps are taken:
        an iteration is a prediction and a step."""
        return 2 * self.iterations

    @property
    def measured_slacks(self) -> int:
        """The number of slacks that the algorithm measures: that of each prediction
        and that of the last step."""
        return self.iterations + 1

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        _refuse_single(self)


@dataclass(frozen=True, kw_only=True)
class PrimalDualConfig(IterativeConfig):
    """Primal-dual policy gradient on fresh samples, as PPO-Lagrangian without a critic (arXiv 2310.12773)."""

    # The samples are of the weights that the steps go on from, and the ratio of both begins at 1.
    adam_beta1: float = 0.9
    weight_average: float = 0.0

    advantage: str = one_of("rloo", "group_norm")
    """rloo: score minus the mean of the others of its prompt. group_norm: reward and utilities standardised
    per prompt, then combined, which changes the objective and the meaning of lambda."""
    ascent_prompts: int = count(32)
    """Prompts whose responses are sampled afresh for the policy steps of an iteration."""
    clip: float = bounded(
        0.2, above=0, at_most=1, says="must lie in (0, 1], as a probability ratio is above 0; 0.2 is usual"
    )
    """PPO's clip of the probability ratio."""
    lam_init: float = bounded(
        1.0, above=0, at_most=1e9, too_low="must be above 0 here, as steps on ln lambda never leave 0"
    )
    """First value of every multiplier."""
    dual_rate: float = bounded(0.5, above=0, at_most=1e9)
    """Step of the dual descent on ln lambda: change per unit of lambda x slack."""

    @property
    def fresh_samples(self) -> tuple[Draws, ...]:
        """The responses sampled in training: for slacks, and for the policy steps of each iteration."""
        return (*super().fresh_samples, Draws(self.iterations, self.ascent_prompts, self.n_responses))

    def trained_responses(self, n: int) -> int:
        """Returns how many of a prompt's `n` responses a policy step trains on:
        a policy gradient takes all."""
        return n

    def check(self) -> None:
        """Refuses values that no run of this kind can use; see `RunConfig.check`."""
        super().check()
        if self.lora_dropout:
            raise UserError(
                f"--lora-dropout {self.lora_dropout:g}: a policy gradient compares the policy with the one "
                "that sampled, which has none; leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class RepoConfig(PrimalDualConfig):
    """Our reading of RePO (arXiv 2410.19933): every prompt has its own constraint, and only those
    that miss it are penalised."""


def _refuse_single(config: RunConfig) -> None:
    """Refuses --labels single where a policy is aligned to another policy than the reference."""
    if config.labels == "single":
        raise UserError(
            "--labels single: its value is that of the reference, and here a policy is aligned to another "
            "one; use regression."
        )


class Algorithm(NamedTuple):
    """A row of the table: everything that the rest of the engine knows of an algorithm, besides its file."""

    # its config class, or, for what leaves no run, that class's name with its module, which stands above this
    config: type[RunConfig] | str
    module: str  # has `train(config, *, resume=None)`
    help: str
    # its name in results; an algorithm that we know from its abstract alone is "our reading of" it
    shown: str

    @property
    def trains_policy(self) -> bool:
        """Tells whether the algorithm leaves a run, which can be resumed, evaluated and swept.

        Training a head leaves none.
        """
        return not isinstance(self.config, str)

    @property
    def config_class(self) -> type:
        """The class of its settings."""
        if self.trains_policy:
            return self.config
        module, name = self.config.rsplit(".", 1)
        return getattr(import_module(module), name)

    def train(self, config, **keywords):
        """Loads the algorithm's module and runs it."""
        return import_module(self.module).train(config, **keywords)


ALGORITHMS = {
    "caid": Algorithm(
        CaidConfig, "engine.caid",
        "alternate policy updates with dual descent (the default)", "CAID",
    ),
    "mocan": Algorithm(
        MocanConfig, "engine.mocan",
        "solve the dual once, then align once", "MoCAN",
    ),
    "pecan": Algorithm(
        PecanConfig, "engine.pecan",
        "one-shot on log-ratios of policies aligned to preferences", "PeCAN",
    ),
    "primal_dual": Algorithm(
        PrimalDualConfig, "engine.baselines.primal_dual",
        "baseline: policy gradient with dual descent (PPO-Lagrangian without a critic)",
        "primal-dual policy gradient",
    ),
    "repo": Algorithm(
        RepoConfig, "engine.baselines.repo",
        "baseline, our reading of RePO: one constraint per prompt", "our reading of RePO",
    ),
    "opd": Algorithm(
        OpdConfig, "engine.baselines.opd",
        "baseline, our reading of OPD: optimistic primal-dual steps", "our reading of OPD",
    ),
    "cdpo": Algorithm(
        CdpoConfig, "engine.baselines.cdpo",
        "baseline, our reading of C-DPO: DPO anew at each multiplier", "our reading of C-DPO",
    ),
    "pd_dpo": Algorithm(
        PdDpoConfig, "engine.baselines.pd_dpo",
        "baseline, our reading of PD-DPO: DPO on safety from the reward's policy", "our reading of PD-DPO",
    ),
    "sacpo": Algorithm(
        SacpoConfig, "engine.baselines.sacpo",
        "baseline: DPO on the reward, then on safety, at a given multiplier", "SACPO",
    ),
    "safe_dpo": Algorithm(
        SafeDpoConfig, "engine.baselines.safe_dpo",
        "baseline: DPO in which safe responses always win", "SafeDPO",
    ),
    "dpo": Algorithm(
        DpoConfig, "engine.baselines.dpo",
        "baseline: plain DPO on the reward or on safety", "DPO",
    ),
    "head": Algorithm(
        "engine.scorers.head_config.HeadConfig", "engine.scorers.training",
        "train a reward or cost head on labelled texts", "head",
    ),
}  # fmt: skip


def shown_name(algorithm: str) -> str:
    """Returns the name of an algorithm as people read it; a folder of samples keeps its name."""
    return ALGORITHMS[algorithm].shown if algorithm in ALGORITHMS else algorithm


def was_by_preference(algorithm: str, values: dict) -> bool:
    """Tells from a run's settings, as its config.json holds them, whether its scores
    were log-ratios of policies.

    A setting that the run's version did not have yet is at its default.
    """
    if algorithm not in ALGORITHMS:
        return False
    config_class = ALGORITHMS[algorithm].config_class
    known = {f.name for f in fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in known}).by_preference
