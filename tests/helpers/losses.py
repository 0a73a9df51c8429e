"""Inputs of the loss ops, their dense results, and the error rule.

Error rule: max|x - x64| / max|x64| <= 2 x that of plain torch in the same dtype + 4 eps, where plain torch is
the worst of three orders of the vocabulary, so that one lucky rounding does not set the bound. Float64 has
nothing more exact beside it: 1e-12. Both come from `kernels.reference`.
"""

import torch

from kernels import lagrangian_policy_loss, reference
from kernels.loss_head.records import Head
from kernels.loss_head.schemes import VECTOR_BYTES_PER_ROW, row_workspace

# There are a few pairs in a row, a sequence in several pairs, one in none, an empty
# one, and a pair with itself.
LENGTHS = (5, 7, 0, 4, 6, 3, 9, 2, 5, 1)

PAIRS = torch.tensor([[0, 1], [3, 2], [4, 3], [6, 8], [9, 9], [8, 6]])


def dense_logprob(**data):
    """Returns logprob [N] and token_logprob [T] from whole logits."""
    return reference.sequence_logprob(**data, return_token_logprob=True)


def dense_dpo(data, options, labels, beta, q=None):
    """Returns loss, margin and q from whole logits; where q is given, it holds the labels."""
    given = {} if q is None else {"labels": "given", "preference": q}
    result = reference.lagrangian_preference_loss(**data, **options, **labels, beta=beta, **given)
    return result.loss, result.margin, result.preference


def make(
    rows=13,
    width=8,
    vocabulary=33,
    lengths=(5, 0, 7, 1),
    dtype=torch.float32,
    seed=0,
    bias=False,
    weighted=False,
):
    g = torch.Generator().manual_seed(seed)
    data = {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": torch.randn(vocabulary, width, generator=g).to(dtype),
        "target": torch.randint(vocabulary, (rows,), generator=g),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    if bias:
        data["bias"] = torch.randn(vocabulary, generator=g).to(dtype)
    if weighted:
        data["token_weight"] = torch.rand(rows, generator=g) * (torch.rand(rows, generator=g) > 0.3)
    return data


def gradients(function, data, options, needs=("hidden", "weight", "bias"), cast=None):
    """Returns the outputs of `function` and its gradients in `needs`, for a fixed mix of all outputs."""
    leaves = {
        k: v.detach().to(cast) if cast and v.is_floating_point() else v.detach() for k, v in data.items()
    }
    for name in needs:
        if name in leaves:
            leaves[name].requires_grad_()
    logprob, token = function(**leaves, **options)
    mix = torch.linspace(-1, 2, len(logprob), dtype=logprob.dtype)
    mix_token = torch.linspace(0.5, -1, len(token), dtype=token.dtype)
    ((logprob * mix).sum() + (token * mix_token).sum()).backward()
    return {"logprob": logprob.detach(), "token": token.detach()} | {
        f"d_{k}": leaves[k].grad for k in needs if k in leaves
    }


def reordered(function, data):
    """Returns the results of function(data) for three orders of the vocabulary,
    with gradients in the original order."""
    results = []
    for seed in range(3):
        order = torch.randperm(len(data["weight"]), generator=torch.Generator().manual_seed(seed))
        back = order.argsort()
        moved = {
            k: v[order] if k in ("weight", "bias") else back[v.long()] if k == "target" else v
            for k, v in data.items()
        }
        result = function(moved)
        results.append({k: v[back] if k in ("d_weight", "d_bias") else v for k, v in result.items()})
    return results


def assert_close(got, plain, exact):
    """Asserts the error rule for a dictionary of tensors; `plain` is a list of such dictionaries."""
    for name, true in exact.items():
        x = got[name]
        assert x.shape == true.shape, name
        if not true.numel():
            continue
        scale = true.abs().max().clamp_min(1e-30)
        error = ((x.double() - true).abs().max() / scale).item()
        worst = max(((p[name].double() - true).abs().max() / scale).item() for p in plain)
        bound = 1e-12 if x.dtype == torch.float64 else 2 * worst + 4 * torch.finfo(x.dtype).eps
        assert error <= bound, f"{name}: {error} against {bound}"


def dense_results(data, needs, options):
    """Returns values and gradients of plain torch for three orders of the vocabulary, and in float64."""
    plain = reordered(lambda moved: gradients(dense_logprob, moved, options, needs), data)
    return plain, gradients(dense_logprob, data, options, needs, torch.float64)


def check_against(dense, function, data, needs, **options):
    """Asserts the error rule for the values and gradients of `function`;
    `dense` comes from `dense_results`."""
    budget = options.pop("memory_budget_bytes", None)

    def fused(**keywords):
        return function(**keywords, return_token_logprob=True, memory_budget_bytes=budget)

    got = gradients(fused, data, options, needs)
    wide = torch.float64 if data["hidden"].dtype == torch.float64 else torch.float32
    assert got["logprob"].dtype == got["token"].dtype == wide
    for name in needs:
        if name in data:
            assert got[f"d_{name}"].dtype == data[name].dtype
    assert_close(got, *dense)


def check_against_dense(
    function, data, needs=("hidden", "weight", "bias"), memory_budget_bytes=None, **options
):
    dense = dense_results(data, needs, options)
    check_against(dense, function, data, needs, memory_budget_bytes=memory_budget_bytes, **options)


FEATURES = {
    "plain": ({}, {}),
    "weights": ({"weighted": True}, {}),
    "bias": ({"bias": True}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({}, {"softcap": 2.0}),
    "all": ({"bias": True, "weighted": True}, {"temperature": 1.3, "softcap": 3.0}),
}


def preference_gradients(function, data, cast=None, needs=("hidden", "weight", "bias")):
    leaves = {
        k: v.detach().to(cast) if cast and v.is_floating_point() else v.detach() for k, v in data.items()
    }
    for name in needs:
        if name in leaves:
            leaves[name].requires_grad_()
    loss, margin, q = function(leaves)
    (3 * loss).backward()
    return {"loss": loss.detach(), "margin": margin, "q": q} | {
        f"d_{k}": leaves[k].grad for k in needs if k in leaves
    }


def problem(dtype=torch.float32, lengths=LENGTHS, pairs=PAIRS, vocabulary=211, width=8, seed=3, **shape):
    g = torch.Generator().manual_seed(seed)
    data = make(sum(lengths), width, vocabulary, lengths, dtype, seed, **shape)
    n = len(lengths)
    logprob = dense_logprob(**{k: data[k] for k in ("hidden", "weight", "target", "cu_seqlens")})[0]
    labels = {
        "pairs": pairs,
        "reward": torch.randn(n, generator=g),
        "utility": torch.randn(n, 2, generator=g),
        "lam": torch.tensor([0.5, 2.0]),
        "ref_logprob": logprob.float() + torch.randn(n, generator=g),
    }
    return data, labels


# Labels that set log-ratios against the score itself.
FORMS = ("regression", "single", "listwise")


def form_of(labels, sequences=10, seed=11):
    """Returns the arguments that say this form of labels. Groups have unlike sizes, lie apart, and bear any
    numbers."""
    g = torch.Generator().manual_seed(seed)
    own = {}
    if labels == "single":
        own["value"] = torch.randn(sequences, generator=g)
    if labels == "listwise":
        names = torch.tensor([7, -1, 2**40, 3])[: max(1, sequences // 2)]
        own["group"] = names[torch.randint(len(names), (sequences,), generator=g)]
    return {"labels": labels} | own


def budget_of(data, rows, softcap=None):
    """Returns the bytes in which a chunk of `rows` rows of the preference pass
    fits, and one row of any op."""
    workspace, hidden = row_workspace(data["hidden"]), data["hidden"]
    head = Head(data["weight"], data.get("bias"), 1.0, softcap)
    budgets = []
    for kind, fitting in (("spent", rows), ("kept", 1)):
        # Tiles and the converted parts of the head grow with the budget.
        budget = 0
        for _ in range(60):
            sizes = workspace.sizes(head, len(hidden), budget, kind)
            per_row = sizes.row + sizes.scratch + hidden.element_size() * hidden.shape[1]
            budget = sizes.fixed + VECTOR_BYTES_PER_ROW * len(hidden) + fitting * per_row
        budgets.append(budget)
    return max(budgets)


def policy(data, labels, group=None, **options):
    n = len(data["cu_seqlens"]) - 1
    group = torch.arange(n) % 3 if group is None else group
    return lagrangian_policy_loss(
        **data, group=group, reward=labels["reward"], utility=labels["utility"], lam=labels["lam"], **options
    )
