"""The data that flows between stages.

Shape legend: P prompts, G responses per prompt, R = P * G rows, N sequences, K pairs, T completion tokens
(packed), V vocabulary, D hidden, J constraints. A name carries its shape: `reward_PG` is [P, G]. Scores obey
one sign everywhere: larger is better (`utility_of_cost` is the only place where a cost is negated).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts ready for the model.

    >>> Prompts(text=["Hi"], kind=["everyday"], token_ids=[[1, 9]], key_P=torch.tensor([7])).key_P.tolist()
    [7]
    """

    text: list[str]  # for people and text scorers: the user's message, or a conversation with its roles
    kind: list[str]  # a free label such as "everyday" or "delicate"; "" where the data has none
    token_ids: list[list[int]]  # the chat template applied once, special tokens included
    key_P: Tensor  # int64 [P]: hash of the token ids; all random numbers of a prompt derive from it
    # The messages of each prompt as the data has them, {"role": text, "content": text}, without the run's
    # system line. Empty where every text is one message of the user.
    messages: list[list[dict[str, str]]] = field(default_factory=list)
    # The row that each prompt was read from, as JSON. Empty where no scorer asks for rows.
    rows: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.text)

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """The messages of each prompt."""
        return self.messages or [[{"role": "user", "content": text}] for text in self.text]

    def and_more(self, others: "Prompts") -> "Prompts":
        """Returns these prompts with others after them."""
        return Prompts(
            text=self.text + others.text,
            kind=self.kind + others.kind,
            token_ids=self.token_ids + others.token_ids,
            key_P=torch.cat((self.key_P, others.key_P)),
            messages=self.conversations + others.conversations if self.messages or others.messages else [],
            rows=self.rows + others.rows,
        )

    def select(self, index: list[int]) -> "Prompts":
        """Returns the prompts at `index`, in that order."""
        return Prompts(
            text=[self.text[i] for i in index],
            kind=[self.kind[i] for i in index],
            token_ids=[self.token_ids[i] for i in index],
            key_P=self.key_P[torch.as_tensor(index, dtype=torch.int64)],
            messages=[self.messages[i] for i in index] if self.messages else [],
            rows=[self.rows[i] for i in index] if self.rows else [],
        )


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Sampled responses, prompt-major: row p * n + i is response i of prompt p (shapes with R = P * n).

    Token log-probs are natural logarithms, 0 in the padding.
    """

    n: int  # responses per prompt
    tokens: Tensor  # int64 [R, max_new_tokens], padded
    length: Tensor  # int64 [R]: tokens sampled, a stop token included
    finished: Tensor  # bool [R]: ended by a stop token, not by the limit
    # float32 [R, max_new_tokens]: under the processed distribution (temperature, top-k, top-p)
    logprob: Tensor
    model_logprob: Tensor  # float32 [R, max_new_tokens]: under the model at that temperature
    # bool [R, max_new_tokens]: steps whose two best perturbed logits
    # lie within `engine.rollout.decoding.NEAR_TIE`
    near_tie: Tensor

    def of_prompts(self, own: range) -> "Rollouts":
        """Returns the responses to consecutive prompts."""
        rows = slice(own.start * self.n, own.stop * self.n)
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "n"}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The scores of P * G responses; larger is better (a cost is already negated)."""

    reward_PG: Tensor  # float64 [P, G]
    utility_PGJ: Tensor  # float64 [P, G, J]
    audit_PGA: Tensor  # float64 [P, G, A]: utilities of scorers that are never optimised
    # float64 [P, G]: log-prob of each response under the reference at the sampling temperature
    ref_logprob_PG: Tensor


@dataclass(frozen=True, kw_only=True)
class Scores(_Scores):
    """Scores in the scorers' own units."""


@dataclass(frozen=True, kw_only=True)
class ScaledScores(_Scores):
    """Scores in the run's units (`Units.apply`)."""


# The unit of improvements in sentences, by --units.
UNIT_NAMES = {
    "deviation": "within-prompt standard deviations of the reference",
    "raw": "the scorers' own units",
}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How a cost counts that is not taken as it is, in the scorer's own units.

    Without a share as 1 where it lies above a number, and else as 0. With a share A and the number t as
    t + (cost - t)+ / A: the mean of this is at least that of the worst share A of all costs, and equals it at
    the best t (Rockafellar and Uryasev 2000, Journal of Risk 2, Theorem 1).
    """

    above: float
    share: float | None = None

    def __call__(self, cost: Tensor) -> Tensor:
        """Returns what costs [...] count, float64."""
        if self.share is None:
            return (cost > self.above).double()
        return self.above + (cost - self.above).clamp(min=0) / self.share


@dataclass(frozen=True, kw_only=True)
class Units:
    """One unit of reward, utilities and audits in this run, in the scorers' own units: the reference's pooled
    within-prompt standard deviations, or 1 with --units raw."""

    reward: float
    utility_J: list[float]
    audit_A: list[float]
    counted_J: list[Counted | None] = field(default_factory=list)  # None for a cost that is taken as it is

    def as_raw(self) -> "Units":
        """Returns the scorers' own units: 1 of each."""
        ones_J, ones_A = [1.0] * len(self.utility_J), [1.0] * len(self.audit_A)
        return replace(self, reward=1.0, utility_J=ones_J, audit_A=ones_A)

    def apply(self, scores: Scores) -> ScaledScores:
        """Returns the same scores in these units."""
        return ScaledScores(
            reward_PG=scores.reward_PG / self.reward,
            utility_PGJ=counted_utilities(scores.utility_PGJ, self.counted_J)
            / torch.tensor(self.utility_J, dtype=torch.float64),
            audit_PGA=scores.audit_PGA / torch.tensor(self.audit_A, dtype=torch.float64),
            ref_logprob_PG=scores.ref_logprob_PG,
        )


def counted_utilities(utility_PGJ: Tensor, counted_J: list[Counted | None]) -> Tensor:
    """Returns utilities, which are negated costs, as their costs count; None leaves one as it is."""
    utilities = utility_PGJ.clone()
    for j, counted in enumerate(counted_J):
        if counted is not None:
            utilities[..., j] = utility_of_cost(counted(-utility_PGJ[..., j]))
    return utilities


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Responses as the rule of an algorithm sees them: their scores in the run's units."""

    reward_PG: Tensor  # float64 [P, G]
    utility_PGJ: Tensor  # float64 [P, G, J]
    # float64 [P, J]: how much the Lagrangian counts a prompt's utilities:
    # 0 where the constraint is not about it
    weight_PJ: Tensor
    cost_PGJ: Tensor  # float64 [P, G, J] in the scorers' own units
    # float64 [P, J]: what each prompt misses of the aims; None where it was not measured
    missing_PJ: Tensor | None = None

    @property
    def counted_PGJ(self) -> Tensor:
        """The utilities as the Lagrangian counts them."""
        return self.utility_PGJ * self.weight_PJ[:, None]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score r + lambda . g of responses in its parts, as the ops of the losses take them."""

    reward_PG: Tensor  # float64 [P, G]
    utility_PGJ: Tensor  # float64 [P, G, J]
    lam_J: Tensor  # float64 [J]

    @staticmethod
    def plain(score_PG: Tensor) -> "Score":
        """Returns a score that is no Lagrangian: all of it stands as the reward."""
        none_PGJ = score_PG.new_zeros(*score_PG.shape, 0)
        return Score(reward_PG=score_PG, utility_PGJ=none_PGJ, lam_J=none_PGJ.new_zeros(0))

    @property
    def total_PG(self) -> Tensor:
        """The score as one number."""
        return self.reward_PG + self.utility_PGJ @ self.lam_J

    def at(self, row_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reward [N] and utility [N, J] of the responses at these rows, and lambda [J]."""
        return self.reward_PG.reshape(-1)[row_N], self.utility_PGJ.flatten(0, 1)[row_N], self.lam_J


# From the scores of any responses to their score under an algorithm, and to another number for each, [P, G].
ScoreRule = Callable[[Scored], Score]
Rule = Callable[[Scored], Tensor]


def lagrangian(lam_J: Tensor) -> ScoreRule:
    """Builds the rule r + lambda . g, of which a policy update maximises the mean less beta x KL (arXiv
    2505.19387, Algorithm 2)."""
    return lambda scored: Score(reward_PG=scored.reward_PG, utility_PGJ=scored.counted_PGJ, lam_J=lam_J)


def utilities_alone(lam_J: Tensor) -> ScoreRule:
    """Builds the rule lambda . g, without the reward."""
    return lambda scored: Score(
        reward_PG=torch.zeros_like(scored.reward_PG), utility_PGJ=scored.counted_PGJ, lam_J=lam_J
    )


@dataclass(frozen=True, kw_only=True)
class Target:
    """States what one policy update fits: log pi = log anchor + (score + shift) /
    coefficient + a constant per prompt.

    The anchor is the reference, or the mixture anchor_share log(anchor policy) + (1 - anchor_share)
    log(reference). An iterate is whatever the stages' updates return; None is the reference. Score, shift and
    what is dropped are rules, so that they hold for any responses that the update learns from.
    """

    lam_J: Tensor  # float64 [J]: multipliers of the scores, for the log
    score: ScoreRule  # labels and pairs come from it
    coefficient: float  # of KL(pi || anchor), in units of the score
    start: object = None  # the iterate whose parameters the update goes on from
    anchor: object = None  # an iterate
    anchor_share: float = 1.0
    shift: Rule | None = None  # subtracted from coefficient x log-ratio in the margin, not from the labels
    dropped: Rule | None = None  # bool: pairs of two such responses are left out

    def on(self, scored: Scored) -> "ScoredTarget":
        """Returns the target on given responses."""
        return ScoredTarget(
            score=self.score(scored),
            coefficient=self.coefficient,
            start=self.start,
            anchor=self.anchor,
            anchor_share=self.anchor_share,
            shift_PG=None if self.shift is None else self.shift(scored),
            dropped_PG=None if self.dropped is None else self.dropped(scored),
        )


@dataclass(frozen=True, kw_only=True)
class ScoredTarget:
    """A `Target` whose rules were applied to the responses that an update learns from;
    the fields are those of `Target`."""

    score: Score
    coefficient: float
    start: object = None
    anchor: object = None
    anchor_share: float = 1.0
    shift_PG: Tensor | None = None  # float64 [P, G]
    dropped_PG: Tensor | None = None  # bool [P, G]

    @property
    def score_PG(self) -> Tensor:
        """The score as one number, float64 [P, G]."""
        return self.score.total_PG

    @property
    def value_P(self) -> Tensor:
        """V(x) = c ln E_ref exp(score / c), c the coefficient, over the prompt's G samples; float64 [P]."""
        c, score_PG = self.coefficient, self.score_PG
        return c * ((score_PG / c).logsumexp(1) - math.log(score_PG.shape[1]))

    def bounded(self, least_weight: float) -> "ScoredTarget":
        """Raises scores to where the tilt exp(score / coefficient) gives a response `least_weight` of the
        mean weight of its prompt's G; what is raised is no Lagrangian any more, but all reward.

        The highest weight is G times the mean anyway, so that no margin of a pair is asked to be larger than
        coefficient x ln(G / least_weight), whatever the scorer's tails are. 0 changes nothing.
        """
        if least_weight == 0:
            return self
        score = self.score
        least_P1 = self.value_P[:, None] + self.coefficient * math.log(least_weight)
        raised_PG = score.total_PG < least_P1
        bounded = Score(
            reward_PG=torch.where(raised_PG, least_P1, score.reward_PG),
            utility_PGJ=score.utility_PGJ.masked_fill(raised_PG[..., None], 0),
            lam_J=score.lam_J,
        )
        return replace(self, score=bounded)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One policy step's pseudo-preference pairs: N distinct sequences and K pairs (a, b) of them."""

    prompt: list[int]  # [N] index into the prompts that the rollouts answer
    row: list[int]  # [N] row of the rollouts
    pairs: Tensor  # int64 [K, 2]: indices into these N sequences


def utility_of_cost(cost: Tensor) -> Tensor:
    """Turns a cost into a utility, of which larger is better: the only place where a sign changes."""
    return -cost
