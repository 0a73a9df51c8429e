"""Attention of packed tokens: runs of queries and keys against the padded grid,
and what the kernels for runs are told."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from engine.model import attention
from engine.model.attention import attend_packed, runs_kernel
from tests.helpers.attention import HOW, LAYOUTS, by_runs


def of_runs(query, key, value, runs, scale, softcap, window):
    assert (
        int(runs.cu_query.diff().max()) == runs.longest[0]
        and int(runs.cu_key.diff().max()) == runs.longest[1]
    )
    assert len(query) == runs.cu_query[-1] and len(key) == runs.cu_key[-1]
    return by_runs(query, key, value, runs.cu_query.tolist(), runs.cu_key.tolist(), scale, softcap, window)


def values_and_gradients(layout, how):
    g = torch.Generator().manual_seed(0)
    tokens = len(layout.position)
    inputs = [
        torch.randn(tokens, heads, 8, generator=g, dtype=torch.float64).requires_grad_()
        for heads in (6, 2, 2)
    ]
    out = attend_packed(*inputs, layout.windowed(how.get("window")), how.get("scale"), how.get("softcap"))
    return [
        out,
        *torch.autograd.grad((out * torch.randn(out.shape, generator=g, dtype=torch.float64)).sum(), inputs),
    ]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_and_the_grid_agree(monkeypatch, name, how):
    grid = values_and_gradients(LAYOUTS[name](), how)
    monkeypatch.setattr(attention, "runs_kernel", lambda query, softcap: of_runs)
    for one, two in zip(values_and_gradients(LAYOUTS[name](), how), grid, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def documented(query, key, value, cu_query, cu_key, max_q, max_k, scale, size, softcap=0.0):
    """Does what both kernels' pages say of their arguments.

    The window counts the keys to the left beside a query's own; -1 is all.
    """
    assert size[1] == 0 and max_q == int(cu_query.diff().max()) and max_k == int(cu_key.diff().max())
    assert cu_query.dtype == cu_key.dtype == torch.int32
    window = None if size[0] == -1 else size[0] + 1
    return by_runs(query, key, value, cu_query.tolist(), cu_key.tolist(), scale, softcap, window)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert causal and deterministic and dropout_p == 0
    return documented(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size, softcap
    )


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("kernel", [torch_2_11, torch_2_12, flash_attn_varlen_func])
def test_the_kernels_are_told_what_the_grid_does(monkeypatch, kernel, how):
    if kernel is flash_attn_varlen_func:
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = kernel
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        attention._flash_attn.cache_clear()
        call = attention._by_flash_attn
    else:
        if "softcap" in how:
            pytest.skip("torch's has none")
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        call = attention._by_torch
    grid = values_and_gradients(LAYOUTS["groups"](), how)
    monkeypatch.setattr(attention, "runs_kernel", lambda query, softcap: call)
    try:
        for one, two in zip(values_and_gradients(LAYOUTS["groups"](), how), grid, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    finally:
        attention._flash_attn.cache_clear()


def test_torch_still_takes_what_it_is_told():
    from torch.nn.attention.varlen import varlen_attn

    assert {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


def test_who_attends(monkeypatch):
    def asked(dtype=torch.bfloat16, width=64, is_cuda=True, softcap=None):
        device = torch.device("cuda" if is_cuda else "cpu")
        return runs_kernel(SimpleNamespace(device=device, dtype=dtype, shape=(3, 2, width)), softcap)

    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    assert asked() is asked(torch.float16, 256) is attention._by_torch
    for other in (
        {"dtype": torch.float32},
        {"width": 257},
        {"width": 20},
        {"is_cuda": False},
        {"softcap": 2.0},
    ):
        assert asked(**other) is None
    monkeypatch.setattr(attention, "_flash_attn", lambda: of_runs)
    assert asked() is asked(softcap=2.0) is attention._by_flash_attn
