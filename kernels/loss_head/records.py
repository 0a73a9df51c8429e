"""The records that the functions of the loss head pass on."""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """Makes logits of states h: softcap * tanh((h weight^T + bias) / softcap) / temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    tolerance: float = 0.0  # relative error that entries left out of the gradients may make; 0: none are


class Rows(NamedTuple):
    """Packed rows: sequence n has rows cu_seqlens[n] to cu_seqlens[n + 1]."""

    hidden: Tensor  # [T, D]
    target: Tensor  # [T]
    token_weight: Tensor | None  # [T]
    cu_seqlens: Tensor  # [N + 1]

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Scores(NamedTuple):
    """The Lagrangian score of a sequence is reward + utility @ lam. With labels "given" all may be None."""

    reward: Tensor | None  # [N]
    utility: Tensor | None  # [N, J]
    lam: Tensor | None  # [J]


class Labels(NamedTuple):
    """Says in which form a preference loss takes the scores; see `kernels.lagrangian_preference_loss`."""

    kind: str
    preference: Tensor | None = None  # [K], with "given"
    uniform: Tensor | None = None  # [K], with "sampled"
    value: Tensor | None = None  # [N], with "single"
    group: Tensor | None = None  # [N], with "listwise"
    generator: torch.Generator | None = None  # draws `uniform` where there is none


class Aims(NamedTuple):
    """Says what a preference loss asks of its log-probs."""

    labels: str  # the kind of `Labels`
    pairs: Tensor  # [K, 2]: sequence numbers
    q: Tensor  # [K]: labels of the pairs
    # float64: s_a - s_b [K] with "regression", s - value [N] with "single", softmax(s / beta) within the
    # group [N] with "listwise"; else empty
    goal: Tensor
    group: Tensor | None  # [N], with "listwise"
    ref_logprob: Tensor  # [N]
    beta: float


class LeftOut(NamedTuple):
    """Says what a chunk's gradients lack, where entries of softmax - onehot were left out of them."""

    mass: float  # their sum over the rows, as probabilities
    rows: int  # that have a coefficient
    # Bounds on the largest error of dH, dW and the bias's gradient, and how large these are at least
    hidden_error: float = 0.0
    hidden_size: float = 0.0
    weight_error: float = 0.0
    weight_size: float = 0.0
    bias_error: float = 0.0
    bias_size: float = 0.0

    def times(self, factor: float) -> "LeftOut":
        """Returns the same of the gradients times a factor."""
        return LeftOut(*self[:2], *(x * abs(factor) for x in self[2:]))


class Policy(NamedTuple):
    """How a policy loss weighs its tokens; see `kernels.lagrangian_policy_loss`."""

    old_logprob: Tensor | None  # [T]
    ref_logprob: Tensor | None  # [T]
    clip: tuple[float, float] | None
    kl_coef: float
    kl: str
    normalize: str


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of log-probs and coefficients: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
