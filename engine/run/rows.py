"""The rows of metrics.jsonl and timing.jsonl: one class for each kind, written and read by attribute.

metrics.jsonl is bitwise equal between equal runs; every time and speed is in timing.jsonl alone. A row is a
JSON object with "kind" and "stage" and the fields of its class. Tensors are written as numbers or lists, and
non-finite numbers as null, which is read as None.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from engine.errors import UserError
from engine.files import is_there, read_json_lines
from engine.run.folder import RunFolder

Numbers = Sequence[float] | Tensor  # one for each constraint; a list where the row was read


@dataclass(frozen=True, kw_only=True)
class Row:
    """The base of all rows."""

    KIND: ClassVar[str]

    stage: str = ""  # the stage that logged the row; `Stage.log` fills it in

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as it is written."""
        return plain({**{f.name: getattr(self, f.name) for f in fields(self)}, "kind": self.KIND})


@dataclass(frozen=True, kw_only=True)
class SampledRow(Row):
    """How far the sampler's log-probs lie from those of the training forward,
    and how many draws were nearly ties."""

    KIND = "sampled"

    prompts: int  # whose samples were run through the training forward again
    responses: int  # of each of them
    logprob_gap: dict[str, float]  # mean, max and kl of `engine.policy.forward.LogprobGap`, nats per token
    near_ties: int  # among all draws of the sampling
    draws: int  # tokens drawn


@dataclass(frozen=True, kw_only=True)
class GivenRow(Row):
    """How likely responses of a file are under the reference (`engine.policy.surprise`), nats per token."""

    KIND = "given"

    prompts: int  # whose responses were compared
    responses: int  # of each of them
    logprob: float
    entropy: float  # minus the log-prob that the reference's own samples would have
    se: float


@dataclass(frozen=True, kw_only=True)
class ReferenceRow(Row):
    """The reference's samples on the training prompts, and what they fix."""

    KIND = "reference"

    names: list[str]  # of the constraints
    audit_names: list[str]
    reward_sd: float  # within-prompt standard deviations of the scores, in the scorers' own units
    utility_sd: Numbers
    audit_sd: Numbers
    correlation: Numbers  # of the reward with each utility, within prompts
    finished: float  # share of responses that ended by themselves
    mean_length: float  # tokens
    prompts: int
    responses: int  # of each prompt
    needed: Numbers  # improvements that the constraints ask for, in units
    aimed: Numbers  # what the dual aims at, in each constraint's own measure
    aim: Numbers  # the same as improvements in units
    margin: float  # of the aims: --margin, or what few samples leave of it
    # The cost from which on each --cost-worst counts (`engine.constraints.WorstShare`); None for others.
    worst_above: list[float | None]


@dataclass(frozen=True, kw_only=True)
class DualRow(Row):
    """The one-shot multipliers."""

    KIND = "dual"

    lam: Numbers
    # 95 % interval; None where a multiplier is held by lam_max
    lam_low: Numbers | None
    lam_high: Numbers | None
    lam_se: Numbers | None
    # What the interval is about: the multipliers with the bias of few responses taken out, or lam itself
    # where the responses are too few for it.
    lam_corrected: Numbers | None
    predicted_improvement: Numbers
    predicted_improvement_se: Numbers
    improvement_at_zero: Numbers  # predicted at lambda 0
    ess: float | Tensor  # mean effective number of responses of a prompt
    kkt: float  # residual of the optimality conditions, in standard deviations of the utility
    aim: Numbers
    threshold: Numbers  # the improvements that the constraints ask for, in units


@dataclass(frozen=True, kw_only=True)
class StepRow(Row):
    """One step of a policy update."""

    KIND = "step"

    iteration: int
    step: int  # from 1 in each update
    loss: float
    grad_norm: float
    learning_rate: float
    # What the loss head left out of its gradients (`kernels.lagrangian_preference_loss`), means over the
    # step's parts: a bound on their relative error, and the probability of a row's tokens.
    gradient_bound: float = 0.0
    left_out: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PairStepRow(StepRow):
    """A step on pairs of responses."""

    accuracy: float  # share of pairs that the policy orders like their labels
    margin: float  # mean size of the margins
    pairs: int


@dataclass(frozen=True, kw_only=True)
class AscentStepRow(StepRow):
    """A step of policy gradient."""

    clip_fraction: float  # share of tokens that the clip cuts off
    advantage: float  # mean size of the advantages
    responses: int


@dataclass(frozen=True, kw_only=True)
class PolicyRow(Row):
    """An iterate, with the multipliers that it was trained at."""

    KIND = "policy"

    iteration: int
    lam: Numbers
    loss: float  # mean of the update's steps
    # KL(tilt || reference) of what the update aims at, nats per response (`engine.dual.tilt_kl`); None where
    # that is no tilt of the reference
    tilt_kl: float | None


@dataclass(frozen=True, kw_only=True)
class TrustRow(Row):
    """How far from the reference a policy is after its update, and again each time that it is taken back."""

    KIND = "trust"

    iteration: int
    kl: float  # nats per response
    kl_se: float
    limit: float  # nats per response: --max-kl-ratio times what the tilt needs
    share: float  # what is left of the way from the reference


@dataclass(frozen=True, kw_only=True)
class IterationRow(Row):
    """The measured slack of an iterate."""

    KIND = "iteration"

    iteration: int
    lam: Numbers
    reward: float  # improvement over the reference, in units
    reward_se: float
    improvement: Numbers
    improvement_se: Numbers
    threshold: Numbers  # the improvements that the constraints ask for, in units
    aim: Numbers
    slack: Numbers  # improvement - aim
    slack_se: Numbers
    kl: float  # nats per response
    kl_se: float
    loss: float
    finished: float
    prompts: int
    responses: int


@dataclass(frozen=True, kw_only=True)
class VerdictRow(Row):
    """The run's verdict, as it begins."""

    KIND = "verdict"

    earlier: int  # verdicts before it on this policy, or on some of its prompts


@dataclass(frozen=True, kw_only=True)
class PairsRow(Row):
    """A file's pairs of responses that updates learn from."""

    KIND = "pairs"

    prompts: int


@dataclass(frozen=True, kw_only=True)
class PreferenceRow(Row):
    """The scores by policies aligned to preferences."""

    KIND = "preference"

    names: list[str]  # reward and the constraints
    log_ratio_sd: list[float]  # within-prompt standard deviation of each log-ratio, nats
    agreement: list[float]  # correlation of each log-ratio with the scorer of its kind, within prompts


@dataclass(frozen=True, kw_only=True)
class SpeedRow(Row):
    """In timing.jsonl: how fast responses were sampled and scored."""

    KIND = "timing"

    tokens: int  # sampled
    sampling_s: float
    scoring_s: float
    tokens_per_s: float
    scored_tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class StageTimeRow(Row):
    """In timing.jsonl: how long one attempt at a stage took."""

    KIND = "stage"

    seconds: float


RowT = TypeVar("RowT", bound=Row)


def plain(value: Any) -> Any:
    """Turns a row's value into JSON: tensors and numpy values become numbers
    or lists, non-finite floats null."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value), value
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a row cannot hold {value!r}")


def read_rows(folder: str | Path, cls: type[RowT]) -> list[RowT]:
    """Reads the metrics rows of one kind, in order.

    Raises: UserError when there are none to read, or a row lacks a field of its class.
    """
    file = RunFolder(Path(folder)).metrics
    return typed(_lines(file), cls, file)


def read_timing(folder: str | Path, cls: type[RowT]) -> list[RowT]:
    """Reads the rows of timing.jsonl of one kind, in order, those of interrupted attempts among them.

    Damaged ones are left out, as no result is made from them.
    Raises: UserError when there is no such file.
    """
    file = RunFolder(Path(folder)).timing
    whole = {f.name for f in fields(cls)}
    return typed((row for row in _lines(file) if whole <= row.keys()), cls, file)


def raw_rows(folder: str | Path) -> list[dict]:
    """Reads all metrics rows as they are written, in order. Raises: UserError when there are none to read."""
    return list(_lines(RunFolder(Path(folder)).metrics))


def time_table(folder: str | Path) -> list[tuple[str, float, float]]:
    """Says where the time went: (stage, seconds, share of all stages), in order;
    the time of interrupted attempts is included.

    Raises: UserError when the folder holds no timing.jsonl.
    """
    seconds: dict[str, float] = {}
    for row in read_timing(folder, StageTimeRow):
        seconds[row.stage] = seconds.get(row.stage, 0.0) + row.seconds
    total = sum(seconds.values())
    return [(stage, s, s / total if total > 0 else 0.0) for stage, s in seconds.items()]


def typed(rows: Iterable[dict], cls: type[RowT], source: Path) -> list[RowT]:
    """Returns the rows of one kind as records of its class; `source` says in messages where they stand.

    Raises: UserError where a row lacks a field of its class.
    """
    names = [f.name for f in fields(cls)]
    rows = [row for row in rows if row.get("kind") == cls.KIND]
    for row in rows:
        if missing := [name for name in names if name not in row]:
            raise UserError(
                f"{source}: a row of kind {cls.KIND} has no {missing[0]}; another version of this "
                "program wrote it: use that version, "
                "or run again."
            )
    return [cls(**{name: row[name] for name in names}) for row in rows]


def _lines(path: Path) -> Iterator[dict]:
    if not is_there(path):
        raise UserError(
            f"{path} does not exist: {path.parent} is no run folder; name the folder that --out made."
        )
    # A killed process cuts a line of the timing, and a resumed one goes on below it.
    timing = RunFolder(path.parent).timing
    return read_json_lines(path, cure="resume the run to have the file repaired", skip_damaged=path == timing)
