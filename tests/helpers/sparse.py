"""Calls of the losses that leave small entries out of their gradients, and the check of what they tell."""

import torch

import kernels
from kernels import reference
from kernels.loss_head import schemes
from tests.helpers.losses import reordered

# There are an empty sequence, one that stands in no pair, and an odd number of rows.
LENGTHS = (130, 101, 0, 97, 120, 88, 61)
PAIRS = torch.tensor([[0, 1], [3, 2], [4, 5]])
OFTEN = (0, 3, 4)  # sequences with a token that is often a target, each the better one of its pair
ROWS, WIDTH, VOCABULARY = sum(LENGTHS), 33, 2311
FULL, FROZEN = ("hidden", "weight", "bias"), ("hidden",)
SIZES = {"peaked": 1.5, "scattered": 1.5, "flat": 0.05, "mixed": 1.5}


def inputs(
    kind="peaked",
    bias=False,
    dtype=torch.float32,
    lengths=LENGTHS,
    seed=0,
    width=WIDTH,
    vocabulary=VOCABULARY,
):
    """Makes rows with targets drawn from the head itself.

    As on states of a trained model, the mass of a row lies on few tokens, and a token is the target of many
    rows ("peaked") or of a few ("scattered"); or it lies on all ("flat"), or both kinds take turns ("mixed").
    """
    g, rows = torch.Generator().manual_seed(seed), sum(lengths)
    size = torch.full((rows, 1), SIZES[kind])
    if kind == "mixed":
        size[::2] = SIZES["flat"]
    hidden, weight = torch.randn(rows, width, generator=g), torch.randn(vocabulary, width, generator=g)
    # Some tokens are frequent everywhere.
    hidden[:, 0], weight[:, 0] = 1, -torch.arange(1, vocabulary + 1).log()
    hidden = hidden * size
    target = torch.multinomial((hidden @ weight.t()).softmax(1), 1, generator=g)[:, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    if kind == "peaked":
        for n in OFTEN if len(lengths) > 4 else (0,):
            target[offsets[n] : offsets[n + 1] : 2] = 7
    data = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "target": target, "cu_seqlens": offsets}
    return data | ({"bias": torch.randn(vocabulary, generator=g).to(dtype)} if bias else {})


def loss_of(ops, op, data, tolerance, budget, options):
    n = len(data["cu_seqlens"]) - 1
    scores = {"reward": torch.arange(n) / n, "utility": torch.ones(n, 1), "lam": torch.tensor([0.5])}
    own = {} if ops is reference else {"gradient_tolerance": tolerance, "memory_budget_bytes": budget}
    if op == "preference":
        ref_logprob = torch.linspace(-300, -200, n)
        own |= {"pairs": PAIRS[: n // 2], "ref_logprob": ref_logprob, "beta": 0.05}
        return ops.lagrangian_preference_loss(**data, **scores, **own, **options)
    return ops.lagrangian_policy_loss(**data, **scores, **own, **options, group=torch.arange(n) % 2)


def run(
    data, op="preference", needs=FULL, tolerance=None, budget=1 << 30, ops=kernels, wide=False, **options
):
    """Returns loss and gradients by name, and what was left out."""
    leaves = {k: v.double() if wide and v.is_floating_point() else v.clone() for k, v in data.items()}
    needs = [name for name in needs if name in data]
    for name in needs:
        leaves[name].requires_grad_()
    result = loss_of(ops, op, leaves, tolerance, budget, options)
    result.loss.backward()
    got = {"loss": result.loss.detach()} | {f"d_{name}": leaves[name].grad for name in needs}
    return got, (None if ops is reference else (float(result.gradient_bound), float(result.left_out)))


def check(data, tolerance=None, **keywords):
    """Asserts that gradients are off by no more than they say and rounding, and say no more than was asked;
    returns what was left out."""
    got, left = run(data, tolerance=tolerance, **keywords)
    bound = left[0]
    keywords.pop("budget", None)
    true = run(data, ops=reference, wide=True, **keywords)[0]
    plain = reordered(lambda moved: run(moved, ops=reference, **keywords)[0], data)
    asked = schemes.tolerance_or_default(tolerance, data["hidden"], data["weight"], 1 << 30)
    assert 0 <= bound <= asked * (1 + 1e-5)
    for name, exact in true.items():
        scale = exact.abs().max().clamp_min(1e-30)

        def error(x, exact=exact, scale=scale):
            return float((x.double() - exact).abs().max() / scale)

        rounding = 2 * max(error(p[name]) for p in plain) + 4 * torch.finfo(got[name].dtype).eps
        off = error(got[name])
        assert off <= rounding + (bound if name != "loss" else 0), f"{name}: {off}, {rounding}, {bound}"
    return left
