"""Every scheme of the loss head on any inputs, against the dense results."""

from typing import NamedTuple

import torch

import kernels
from kernels import reference
from kernels.loss_head.schemes import VECTOR_BYTES_PER_ROW
from tests.helpers.losses import assert_close, budget_of, dense_logprob, make, reordered

# One member of the second pair is empty, and both of the last. Sequences 2 and 3 together are longer than a
# chunk of E. Sequence 5 stands in no pair.
LENGTHS = (6, 0, 9, 4, 0, 18)

PAIRS = torch.tensor([[2, 3], [0, 1], [3, 2], [2, 3], [4, 1]])

FULL, FROZEN = ("hidden", "weight", "bias"), ("hidden",)


class Scheme(NamedTuple):
    op: str
    needs: tuple[str, ...]  # gradients
    share: float | None  # rows of a chunk, as a share of all; None: memory for all rows at once


# The first letter is the scheme's in the docstring of `kernels.loss_head.schemes`.
SCHEMES = {
    "A": Scheme("logprob", FULL, 0.2),
    "B": Scheme("logprob", FULL, None),
    "C": Scheme("logprob", FROZEN, None),
    "D": Scheme("preference", FULL, 0.42),
    "E": Scheme("preference", FULL, 0.2),
    "F": Scheme("policy", FULL, 0.2),
    "F, frozen head": Scheme("policy", FROZEN, 0.2),
    "B, preference": Scheme("preference", FULL, None),
    "C, preference": Scheme("preference", FROZEN, None),
}

ALL_OPTIONS = {"temperature": 0.7, "softcap": 3.0}


class Taken(set):
    """Letters of the schemes that were taken, and the device of the calls."""

    device = torch.device("cpu")


def inputs(dtype=torch.float32, vocabulary=141, width=12, lengths=LENGTHS, seed=4, bias=True, **shape):
    data = make(sum(lengths), width, vocabulary, lengths, dtype, seed, bias, **shape)
    # The last column is a part of its own in most splits of the vocabulary.
    data["target"][:1] = data["target"][-1:] = vocabulary - 1
    return data


def keywords_of(op, data, options=None, seed=7):
    """Returns the arguments that the op takes beyond rows and options;
    references are near the present log-probs."""
    if op == "logprob":
        return {}
    g, n = torch.Generator().manual_seed(seed), len(data["cu_seqlens"]) - 1
    logprob, token = dense_logprob(
        **{k: v.double() if v.is_floating_point() else v for k, v in data.items()}, **options or {}
    )

    def near(x, distance):
        return (x + distance * torch.randn(len(x), generator=g)).float()

    # Long sequences score high. Neither the policy loss nor a pair's sigmoid(margin) - label is then the
    # small difference of larger numbers, whose relative error would be a matter of luck.
    lengths = data["cu_seqlens"].diff()
    scores = {
        "reward": 2 * lengths / lengths.float().mean(),
        "utility": 0.1 * torch.randn(n, 2, generator=g),
        "lam": torch.tensor([0.5, 2.0]),
    }
    if op == "preference":
        return scores | {"pairs": PAIRS, "ref_logprob": near(logprob, 10.0), "beta": 0.1}
    references = {"old_logprob": near(token, 0.3), "ref_logprob": near(token, 0.5)}
    return (
        scores | references | {"group": torch.arange(n) % 2, "clip": (0.2, 0.3), "kl_coef": 0.1, "kl": "k3"}
    )


def mixed(logprob, token):
    """Returns a number that depends on both arguments, and the values."""
    ends = ((-1, 2), logprob), ((0.5, -1), token)
    mix, mix_token = (torch.linspace(*limits, len(x), dtype=x.dtype, device=x.device) for limits, x in ends)
    return (logprob * mix).sum() + (token * mix_token).sum(), {
        "logprob": logprob.detach(),
        "token": token.detach(),
    }


def fused(ops, op, data, keywords, budget=None, options=None):
    """Runs an op of a module, `kernels` or `kernels.reference`.

    Returns what is differentiated, and the values.
    """
    everything = (
        data | keywords | (options or {}) | ({} if ops is reference else {"memory_budget_bytes": budget})
    )
    if op == "logprob":
        return mixed(*ops.sequence_logprob(**everything, return_token_logprob=True))
    if op == "preference":
        result = ops.lagrangian_preference_loss(**everything)
        return result.loss, {"loss": result.loss.detach(), "margin": result.margin}
    result = ops.lagrangian_policy_loss(**everything)
    return result.loss, {"loss": result.loss.detach(), "token": result.token_logprob}


def with_gradients(function, data, needs, cast=None):
    """Returns the values of function(data) and the gradients of three times what it differentiates."""
    leaves = {
        k: v.detach().to(cast) if cast and v.is_floating_point() else v.detach() for k, v in data.items()
    }
    for name in needs:
        leaves[name].requires_grad_()
    loss, values = function(leaves)
    (3 * loss).backward()
    return values | {f"d_{name}": leaves[name].grad for name in needs}


def budget_for(scheme, data, options=None):
    if scheme.share is None:
        return 1 << 30
    rows = len(data["hidden"])
    beside = 2 * VECTOR_BYTES_PER_ROW * rows if scheme.op == "policy" else 0
    return beside + budget_of(data, int(scheme.share * rows), (options or {}).get("softcap"))


def placed(values, device):
    """Moves values to the device, but for those that schemes are chosen from."""
    stay = "cu_seqlens", "pairs"
    return {
        k: v.to(device) if isinstance(v, torch.Tensor) and k not in stay else v for k, v in values.items()
    }


def run(name, data, keywords, options=None, needs=None, device="cpu"):
    """Returns the values and gradients that one scheme gives."""
    scheme, data, keywords = SCHEMES[name], placed(data, device), placed(keywords, device)
    budget = budget_for(scheme, data, options)
    results = with_gradients(
        lambda leaves: fused(kernels, scheme.op, leaves, keywords, budget, options),
        data,
        needs or scheme.needs,
    )
    return placed(results, "cpu")


def check(name, data, taken, keywords=None, options=None, needs=None):
    """Asserts the error rule for one scheme, and that this scheme is the one
    that ran; returns its results."""
    scheme = SCHEMES[name]
    keywords, needs = (
        keywords or keywords_of(scheme.op, data, options),
        [k for k in needs or scheme.needs if k in data],
    )
    got = run(name, data, keywords, options, needs, taken.device)
    assert taken == {name[0]}

    def dense(data, cast=None):
        return with_gradients(
            lambda leaves: fused(reference, scheme.op, leaves, keywords, None, options), data, needs, cast
        )

    assert_close(got, reordered(dense, data), dense(data, torch.float64))
    for leaf in needs:
        assert got[f"d_{leaf}"].dtype == data[leaf].dtype
    return got
