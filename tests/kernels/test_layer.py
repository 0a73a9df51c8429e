"""Tests what stands between a layer's products, compiled, against the torch code that is its
specification and against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels import compiled
from kernels.layer import layer

pytestmark = pytest.mark.skipif(not compiled.instructions, reason="no compiled kernels")
SIZES = [(1, 2), (3, 30), (5, 64), (7, 577), (2, 4098)]


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def compiled_and_torch(function, *arguments):
    """Makes the same call without a gradient, and with one, which torch serves; returns both results."""
    with torch.no_grad():
        fast = function(*arguments)
    leaves = [
        x.requires_grad_() if isinstance(x, torch.Tensor) else x
        for x in (a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    ]
    slow = function(*leaves)
    assert all(x.grad_fn is not None for x in (slow if isinstance(slow, tuple) else (slow,)))
    return fast, slow


@pytest.mark.parametrize("rows, width", SIZES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_norm(rows, width, scale):
    x, delta, weight = (
        normal(rows, width, scale=scale),
        normal(rows, width + 1, scale=scale)[:, :width],
        normal(width),
    )
    for own, torchs in (
        compiled_and_torch(layer.rms_norm, x, weight, 1e-5),
        compiled_and_torch(lambda *a: layer.add_rms_norm(*a)[1], x, delta, weight, 1e-5),
    ):
        torch.testing.assert_close(own, torchs, rtol=1e-5, atol=1e-6)
    total, normed = layer.add_rms_norm(x, delta, weight, 1e-5)
    exact = F.rms_norm((x + delta).double(), (width,), weight.double(), 1e-5)
    assert torch.equal(total, x + delta) and (normed - exact).abs().max() <= 4e-7 * max(1, exact.abs().max())


@pytest.mark.parametrize("heads, kv_heads, d", [(1, 1, 2), (9, 3, 64), (4, 2, 10), (3, 1, 48)])
def test_rotation_and_split(heads, kv_heads, d):
    rows = 5
    qkv, angle = normal(rows, (heads + 2 * kv_heads) * d), normal(rows, d, scale=3.0)
    fast, slow = compiled_and_torch(
        lambda x: layer.split_rotated(x, angle.cos(), angle.sin(), heads, kv_heads), qkv
    )
    for own, torchs, n in zip(fast, slow, (heads, kv_heads, kv_heads), strict=True):
        assert own.shape == (rows, n, d) and own.is_contiguous()
        torch.testing.assert_close(own, torchs, rtol=1e-6, atol=1e-6)
    assert torch.equal(fast[2], qkv.view(rows, -1, d)[:, heads + kv_heads :])


@pytest.mark.parametrize("rows, width", SIZES)
def test_gate(rows, width):
    gate_up = normal(rows, 2 * width, scale=20.0)
    own, torchs = compiled_and_torch(layer.gated_silu, gate_up)
    gate, up = gate_up.double().chunk(2, 1)
    exact = F.silu(gate) * up
    assert (own - exact).abs().max() <= 1e-6 * exact.abs().max()
    torch.testing.assert_close(own, torchs, rtol=2e-6, atol=1e-6)


def test_ends_of_the_gate():
    gate_up = torch.tensor(
        [[-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4, torch.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    )
    own = layer.gated_silu(gate_up)
    torch.testing.assert_close(own, F.silu(gate_up[:, :8]), rtol=1e-6, atol=1e-30, equal_nan=True)


def assert_rounded_once(own: torch.Tensor, exact: torch.Tensor, atol: float = 0.0) -> None:
    """Asserts that bfloat16 numbers are as near to float64 as the dtype allows, that is half of its last
    place, with a little for float32 arithmetic; atol: what cancels in that."""
    assert own.dtype == torch.bfloat16 and own.shape == exact.shape
    error = (own.double() - exact).abs() - exact.abs() * 2**-8 * (1 + 2**-10)
    assert (error <= atol + 1e-39).all(), float(error.max())


@pytest.mark.parametrize("rows, width", SIZES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_norm_in_bfloat16(rows, width, scale):
    x, delta, weight = (
        t.bfloat16()
        for t in (
            normal(rows, width, scale=scale),
            normal(rows, width + 1, scale=scale)[:, :width],
            normal(width),
        )
    )
    total, normed = layer.add_rms_norm(x, delta, weight, 1e-5)
    # The norm is that of the sum as the next layer sees it.
    assert torch.equal(total, x + delta)
    assert_rounded_once(normed, F.rms_norm(total.double(), (width,), weight.double(), 1e-5))
    assert_rounded_once(
        layer.rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    )


@pytest.mark.parametrize("heads, kv_heads, d", [(1, 1, 2), (9, 3, 64), (4, 2, 10), (3, 1, 48)])
def test_rotation_and_split_in_bfloat16(heads, kv_heads, d):
    qkv, angle = normal(5, (heads + 2 * kv_heads) * d).bfloat16(), normal(5, d, scale=3.0)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    q, k, v = layer.split_rotated(qkv, cos, sin, heads, kv_heads)
    exact = layer.split_rotated(qkv.double().requires_grad_(), cos.double(), sin.double(), heads, kv_heads)
    for own, want in ((q, exact[0]), (k, exact[1])):
        assert_rounded_once(own, want.detach(), atol=1e-6)
    assert torch.equal(v, qkv.view(5, -1, d)[:, heads + kv_heads :])


@pytest.mark.parametrize("rows, width", SIZES)
def test_gate_in_bfloat16(rows, width):
    gate_up = normal(rows, 2 * width, scale=20.0).bfloat16()
    gate, up = gate_up.double().chunk(2, 1)
    # Below exp(-87.3) the gate is 0.
    assert_rounded_once(layer.gated_silu(gate_up), F.silu(gate) * up, atol=1e-34)


def test_gradients_in_bfloat16_are_rounded_once_and_trained_values_are_the_sampled_ones():
    qkv, angle, gate_up = normal(6, 5 * 48).bfloat16(), normal(6, 48, scale=3.0), normal(6, 130, scale=3.0)
    cos, sin, weight = angle.cos().bfloat16(), angle.sin().bfloat16(), normal(576).bfloat16()
    for function, x in (
        (lambda x: layer.split_rotated(x, cos.to(x.dtype), sin.to(x.dtype), 3, 1)[0], qkv),
        (layer.gated_silu, gate_up.bfloat16()),
        # So many numbers that torch's norm differs in one.
        (lambda x: layer.rms_norm(x, weight.to(x.dtype), 1e-5), normal(500, 576).bfloat16()),
    ):
        (fast, slow), exact_x = compiled_and_torch(function, x), x.double().requires_grad_()
        assert torch.equal(fast, slow)
        leaf = x.clone().requires_grad_()
        upstream = normal(*fast.shape).bfloat16()
        (own,) = torch.autograd.grad(function(leaf), leaf, upstream)
        (want,) = torch.autograd.grad(function(exact_x), exact_x, upstream.double())
        assert_rounded_once(own, want, atol=1e-6)


def test_rounding_to_bfloat16():
    """Sums are rounded as torch does it: to the nearest, ties to the even one, beyond the largest to
    infinity, and NaN stays NaN."""
    largest = torch.finfo(torch.bfloat16).max
    one = [1.0, 1.0078125, -1.0, 1.0, 1.0, largest, largest, torch.inf, torch.nan, 1e-40, 3e38, torch.inf]
    other = [
        2**-8,
        2**-8,
        -(2**-8),
        2**-9,
        3 * 2**-9,
        largest * 2**-9,
        largest,
        1.0,
        1.0,
        2e-40,
        0.0,
        -torch.inf,
    ]
    for width in (len(one), 4 * len(one), 7):  # whole vectors and what is left of them
        x, delta = (torch.tensor([numbers * 4])[:, :width].bfloat16() for numbers in (one, other))
        total, _ = layer.add_rms_norm(x, delta, torch.ones(width).bfloat16(), 1e-5)
        torch.testing.assert_close(total, x + delta, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instructions", compiled.instructions)
def test_instructions_threads_and_batches_change_no_bit(instructions, dtype, monkeypatch):
    monkeypatch.setattr(compiled, "make", compiled.make._replace(instructions=instructions))
    x, delta, weight, angle = (
        t.to(dtype) for t in (normal(37, 90), normal(37, 90, scale=2.0), normal(90), normal(37, 18))
    )

    def all_of(part: slice) -> list[torch.Tensor]:
        cos, sin = angle[part].cos(), angle[part].sin()
        return [
            *layer.add_rms_norm(x[part], delta[part], weight, 1e-5),
            layer.rms_norm(x[part], weight, 1e-5),
            *layer.split_rotated(x[part], cos, sin, 3, 1),
            layer.gated_silu(x[part]),
        ]

    whole = all_of(slice(None))
    monkeypatch.setattr(compiled, "make", compiled.make._replace(instructions=compiled.instructions[-1]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = all_of(slice(None))
    finally:
        torch.set_num_threads(threads)
    single = [torch.cat(parts) for parts in zip(*(all_of(slice(i, i + 1)) for i in range(37)), strict=True)]
    for a, b, c in zip(whole, again, single, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows_and_wrong_shapes(dtype):
    empty = torch.empty(0, 8, dtype=dtype)
    assert layer.rms_norm(empty, torch.ones(8, dtype=dtype), 1e-5).shape == (0, 8)
    assert layer.gated_silu(empty).shape == (0, 4)
    assert [x.shape for x in layer.split_rotated(empty, empty[:, :2], empty[:, :2], 2, 1)] == [
        (0, 2, 2),
        (0, 1, 2),
        (0, 1, 2),
    ]
    ones = partial(torch.ones, dtype=dtype)
    with pytest.raises(ValueError, match="weight"):
        layer.rms_norm(ones(2, 8), ones(7), 1e-5)
    with pytest.raises(ValueError, match="qkv"):
        layer.split_rotated(ones(2, 9), ones(2, 2), ones(2, 2), 2, 1)
    with pytest.raises(ValueError, match="gate_up"):
        compiled._native.gated_silu(ones(2, 7), ones(2, 3), 1, compiled.instructions[0])
