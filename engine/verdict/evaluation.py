"""The held-out verdict: improvements over the reference with intervals, clustered by prompt.

Prompts are the unit of sampling: responses to one prompt are averaged first, so the intervals hold for new
prompts of the same kind, not only for new responses. Everything here is a pure function of scores and texts;
other stages sample and score.

`python -m engine.evaluate RUN` judges a finished run again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor

from engine.constraints import KINDS, Judged, Limit, judge, overall
from engine.constraints.limit import MET, NOT_RESOLVED
from engine.errors import UserError
from engine.files import one_line, read_json, shown
from engine.intervals import Estimate, clipped, estimate, improvement
from engine.records import Prompts, Rollouts, ScaledScores
from engine.verdict.refusals import FIRST_WORDS, SCORER, OverRefusal, is_refusal, refusal_shares


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at held-out responses has found of the constraints."""

    prompts: int
    responses: int  # per prompt, of the policy
    share: float  # of 1 - confidence that the one-sided bounds have spent
    planned: int  # looks at most
    means: tuple[float, ...]  # of each constraint in its measure
    bounds: tuple[tuple[float, float], ...]  # one-sided, lower and upper, about these means
    words: tuple[str, ...]  # of each constraint

    @staticmethod
    def of(responses: int, prompts: int, asked: "Asked", constraints: Sequence[Judged]) -> "Look":
        """Notes a look."""
        return Look(
            prompts=prompts,
            responses=responses,
            share=asked.share,
            planned=asked.looks,
            means=tuple(c.judged.mean for c in constraints),
            bounds=tuple((c.judged.lower, c.judged.upper) for c in constraints),
            words=tuple(c.word for c in constraints),
        )

    @staticmethod
    def from_dict(data: dict) -> "Look":
        """Restores a look from JSON."""
        restored = {name: tuple(data[name]) for name in ("means", "words")}
        return Look(**{**data, **restored, "bounds": tuple(map(tuple, data["bounds"]))})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that a verdict says.

    Improvements are policy minus reference in the run's units; pairs are (reference, policy).
    """

    reward: Estimate
    constraints: tuple[Judged, ...]
    audits: tuple[tuple[str, Estimate], ...]  # (name, improvement of the negated cost)
    # KL(policy || reference), nats per response. Where samples are truncated it is the mean log-ratio of the
    # whole policies on them, which is no KL.
    kl: Estimate
    finished: tuple[float, float]  # share of responses that ended by a stop token
    mean_length: tuple[float, float]  # tokens per response
    refusal_harmless: (
        tuple[float, float] | None
    )  # share of refusals on the prompts not marked delicate, if any
    n_prompts: int
    n_responses: int  # per prompt, of the policy
    confidence: float = 0.95  # of all intervals and bounds
    truncated: bool = False  # the samples are of distributions that top-k or top-p has cut
    units: str = "deviation"  # of improvements: the run's --units
    refusals_by: str = FIRST_WORDS  # what tells refusals: their first words, or a scorer
    looks: tuple[Look, ...] = ()  # at held-out responses, the last one included

    @property
    def word(self) -> str:
        """Returns the word for all constraints together: "met", "not met" or "not resolved"."""
        return overall(self.constraints)

    @property
    def is_decided(self) -> bool:
        """Tells whether no further look can change the verdict: all constraints are met together, or each of
        them is met or not met."""
        return self.word == MET or all(c.word != NOT_RESOLVED for c in self.constraints)

    @property
    def needs_prompts(self) -> bool:
        """Tells whether no constraint that is open can have a word on so few prompts."""
        return all(c.silent_for for c in self.constraints if c.word == NOT_RESOLVED)

    def as_dict(self) -> dict:
        """Converts the verdict to plain numbers, strings, lists and dictionaries for JSON.

        The keys truncated, units and refusals_by are there where they are not their defaults.
        """
        found = {**asdict(self), "constraints": [_constraint_as_dict(c) for c in self.constraints]}
        usual = {"truncated": False, "units": "deviation", "refusals_by": FIRST_WORDS}
        return {key: value for key, value in found.items() if key not in usual or value != usual[key]}

    @classmethod
    def read(cls, path: Path, *, cure: str) -> "Evaluation":
        """Reads evaluation.json. `cure` ends the error message.

        Raises: UserError where the file cannot be read or holds something else.
        """
        data = read_json(path, cure=cure)
        try:
            return cls.from_dict(data)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{shown(path)}: not a whole evaluation ({what}); {cure}.") from error

    @classmethod
    def from_dict(cls, data: dict) -> "Evaluation":
        """Restores a verdict from `as_dict`, also after a round trip through JSON."""
        refusal = data["refusal_harmless"]
        return cls(
            reward=Estimate(**data["reward"]),
            constraints=tuple(_constraint_from_dict(item) for item in data["constraints"]),
            audits=tuple((name, Estimate(**item)) for name, item in data["audits"]),
            kl=Estimate(**data["kl"]),
            finished=tuple(data["finished"]),
            mean_length=tuple(data["mean_length"]),
            refusal_harmless=None if refusal is None else tuple(refusal),
            n_prompts=data["n_prompts"],
            n_responses=data["n_responses"],
            # Runs that are older than the choice have no such key.
            confidence=data.get("confidence", 0.95),
            truncated=data.get("truncated", False),
            units=data.get("units", "deviation"),
            refusals_by=data.get("refusals_by", FIRST_WORDS),
            looks=tuple(Look.from_dict(look) for look in data.get("looks", ())),
        )


def _constraint_as_dict(c: Judged) -> dict:
    found = asdict(c)
    limit = found.pop("limit")
    return {"threshold": limit.pop("value"), "kind": c.limit.kind, **limit, **found}


def _constraint_from_dict(data: dict) -> Judged:
    # Runs that are older than the other kinds have improvements alone.
    kind = KINDS[data.get("kind", "improvement")]
    asked = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    if within := data.get("costs_within"):
        asked["costs_within"] = tuple(within)
    limit = kind(value=data["threshold"], **asked)
    # Those that are older than the looks call one constraint met where its bound confirms it.
    known = {"holds": data["word"] == MET}
    names = ("aim", "word", "reference", "unit", "holds", "exact", "spread")
    known |= {key: data[key] for key in names if key in data}
    estimates = {key: Estimate(**data[key]) for key in ("estimate", "measured") if data.get(key)}
    return Judged(limit=limit, **known, **estimates)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result of `python -m engine.evaluate`: a verdict, and what a run's verdict leaves out.

    Pairs are (reference, policy).
    """

    evaluation: Evaluation
    pair_order: tuple[Estimate | None, Estimate | None]  # on the responses of each, see `pair_order`
    over_refusal: OverRefusal
    pairs_like: str = "r + lambda g"  # the score whose order pairs are compared with

    def as_dict(self) -> dict:
        """Adds four keys to `Evaluation.as_dict`, so that `Evaluation.from_dict` reads this too."""
        return {
            **self.evaluation.as_dict(),
            "slack": [asdict(c.slack) for c in self.evaluation.constraints],
            "pair_order": [None if e is None else asdict(e) for e in self.pair_order],
            "over_refusal": asdict(self.over_refusal),
            "pairs_like": self.pairs_like,
        }


def pair_order(log_ratio_PG: Tensor, score_PG: Tensor, confidence: float = 0.95) -> Estimate | None:
    """Estimates how often the policy orders two responses to a prompt as the Lagrangian does.

    That is the share of pairs in which beta (log pi - log pi_ref) is larger for the response with the larger
    s = r + lambda . g (the margin of arXiv 2505.19387, Algorithm 2). log_ratio_PG: log pi(y|x) - log
    pi_ref(y|x), nats; any beta > 0 orders alike. score_PG: s. Pairs of equal s are left out, those of equal
    log-ratio count one half. The mean is over prompts, of each prompt's share, and its bounds end at 0 and 1;
    prompts without a pair are left out and not in n. None where fewer than two prompts are left.

    Raises: UserError for a log-ratio that is not finite.
    """
    assert log_ratio_PG.shape == score_PG.shape, (log_ratio_PG.shape, score_PG.shape)
    if not log_ratio_PG.isfinite().all():
        raise UserError(
            "a response has a log-probability that is not finite; use --dtype float32 in training."
        )
    difference_PGG = log_ratio_PG[:, :, None] - log_ratio_PG[:, None, :]
    # Each pair counts once, in the order in which s falls.
    pair_PGG = (score_PG[:, :, None] > score_PG[:, None, :]).double()
    agrees_PGG = pair_PGG * (difference_PGG.sign().double() + 1) / 2
    pairs_P = pair_PGG.sum((1, 2))
    share_P = agrees_PGG.sum((1, 2))[pairs_P > 0] / pairs_P[pairs_P > 0]
    if len(share_P) < 2:
        return None
    return clipped(estimate(share_P, confidence), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A policy's responses to the held-out prompts."""

    rollouts: Rollouts
    texts: Sequence[str]  # [R] decoded, prompt-major
    scores: ScaledScores
    refused: Sequence[bool] | None = None  # [R] whether a scorer calls each a refusal; None: first words tell


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The constraints of a run, and what training aimed at for their sake."""

    limits: Sequence[Limit]
    aims: Sequence[float]  # each in its constraint's measure
    unit_J: Sequence[float]  # one of the run's units in the scorer's
    confidence: float = 0.95  # of intervals, and of all that is ever said of the constraints
    # The share of 1 - confidence that one-sided bounds may spend, see `engine.looks`.
    share: float = 1.0
    looks: int = 1  # how many are planned at most
    truncated: bool = False  # the samples are of distributions that top-k or top-p has cut
    units: str = "deviation"  # the run's --units


def evaluate(
    policy: Side,
    reference: Side,
    prompts: Prompts,
    kl_PG: Tensor,
    asked: Asked,
    audit_names: Sequence[str],
    earlier: Evaluation | None = None,
) -> Evaluation:
    """Judges a policy by its responses and the reference's to the same prompts.

    kl_PG [P, G] holds log pi(y|x) - log pi_ref(y|x) of the policy's responses in nats:
    its mean is KL(policy || reference), unless the samples are truncated. earlier: the verdict of the look
    before, on some of these responses.
    Raises: UserError for fewer than two prompts, or for a constraint, or scores that are not finite.
    """
    for side in (policy, reference):
        n = side.rollouts.n
        assert len(side.texts) == len(prompts) * n == side.rollouts.length.numel(), (
            len(side.texts),
            len(prompts),
            n,
        )
    assert len(asked.limits) == policy.scores.utility_PGJ.shape[2], asked.limits
    assert len(audit_names) == policy.scores.audit_PGA.shape[2], audit_names

    confidence, about = asked.confidence, [limit.rows(prompts) for limit in asked.limits]
    constraints = judge(
        asked.limits,
        asked.aims,
        *(
            [side.scores.utility_PGJ[rows, :, j] for j, rows in enumerate(about)]
            for side in (policy, reference)
        ),
        asked.unit_J,
        confidence=confidence,
        alpha=(1 - confidence) * asked.share,
        before=earlier.constraints if earlier else (),
    )
    looks = (
        *(earlier.looks if earlier else ()),
        Look.of(policy.rollouts.n, len(prompts), asked, constraints),
    )
    audits = [
        (name, improvement(policy.scores.audit_PGA[..., a], reference.scores.audit_PGA[..., a], confidence))
        for a, name in enumerate(audit_names)
    ]
    both = (reference.rollouts, policy.rollouts)
    refused = (
        [is_refusal(text) for text in side.texts] if side.refused is None else side.refused
        for side in (reference, policy)
    )
    return Evaluation(
        reward=improvement(policy.scores.reward_PG, reference.scores.reward_PG, confidence),
        constraints=constraints,
        looks=looks,
        audits=tuple(audits),
        kl=estimate(kl_PG.double().mean(1), confidence),
        finished=tuple(r.finished.double().mean().item() for r in both),
        mean_length=tuple(r.length.double().mean().item() for r in both),
        refusal_harmless=refusal_shares(*refused, prompts.kind),
        refusals_by=FIRST_WORDS if policy.refused is None else SCORER,
        n_prompts=len(prompts),
        n_responses=policy.rollouts.n,
        confidence=confidence,
        truncated=asked.truncated,
        units=asked.units,
    )
