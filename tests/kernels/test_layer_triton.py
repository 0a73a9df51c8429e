"""The GPU kernels between a layer's products, in Triton's interpreter, against float64
and against torch in the same dtype."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels.layer import layer
from kernels.layer.records import Places
from tests.helpers.interpreter import compiled, interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def assert_as_good_as_torch(got, plain, exact) -> None:
    """Asserts at most twice torch's error and two roundings.

    The interpreter cuts bfloat16 off instead of rounding it.
    """
    assert got.dtype == plain.dtype and got.shape == exact.shape and got.is_contiguous()
    error, bound = (
        (x.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30) for x in (got, plain)
    )
    assert error <= 2 * bound + 2 * torch.finfo(got.dtype).eps, f"{error} against {bound}"


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 2), (3, 577), (2, 1024)])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_interpreted_norm(rows, width, scale, dtype):
    from kernels.layer import layer_triton as triton_layer

    x, weight = normal(rows, width, dtype=dtype, scale=scale), normal(width, dtype=dtype)
    delta = normal(rows, 2 * width, dtype=dtype, scale=scale)[:, ::2]
    same, normed = triton_layer.rms_norm(x, None, weight, 1e-5)
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert same is x
    assert_as_good_as_torch(normed, layer.rms_norm(x.clone().requires_grad_(), weight, 1e-5).detach(), exact)
    total, normed = triton_layer.rms_norm(x, delta, weight, 1e-5)
    assert_as_good_as_torch(total, x + delta, x.double() + delta.double())
    exact = F.rms_norm(total.double(), (width,), weight.double(), 1e-5)
    assert_as_good_as_torch(normed, F.rms_norm(total, (width,), weight, 1e-5), exact)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, d", [(1, 1, 2), (9, 3, 64), (4, 2, 10), (3, 1, 48)])
def test_interpreted_rotation_and_split(heads, kv_heads, d, dtype):
    from kernels.layer import layer_triton as triton_layer

    rows = 3
    wide, angle = (
        normal(rows, (heads + 2 * kv_heads) * d + 5, dtype=dtype),
        normal(rows, d, dtype=torch.float32, scale=3.0),
    )
    qkv, cos, sin = wide[:, :-5], angle.cos().to(dtype), angle.sin().to(dtype)
    got = triton_layer.split_rotated(qkv, cos, sin, heads, kv_heads)
    plain = layer.split_rotated(qkv.clone().requires_grad_(), cos, sin, heads, kv_heads)
    exact = layer.split_rotated(qkv.double(), cos.double(), sin.double(), heads, kv_heads)
    for own, torchs, true in zip(got, plain, exact, strict=True):
        assert_as_good_as_torch(own, torchs.detach(), true)
    assert torch.equal(got[2], plain[2])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 1030), (2, 1024)])
def test_interpreted_gate(rows, width, dtype):
    from kernels.layer import layer_triton as triton_layer

    gate_up = normal(rows, 2 * width, dtype=dtype, scale=20.0)
    gate, up = gate_up.double().chunk(2, 1)
    assert_as_good_as_torch(
        triton_layer.gated_silu(gate_up),
        layer.gated_silu(gate_up.clone().requires_grad_()).detach(),
        F.silu(gate) * up,
    )


@interpreted
def test_interpreted_ends_of_the_gate():
    from kernels.layer import layer_triton as triton_layer

    gate_up = torch.tensor(
        [[-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4, torch.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    )
    torch.testing.assert_close(
        triton_layer.gated_silu(gate_up), F.silu(gate_up[:, :8]), rtol=1e-6, atol=1e-30, equal_nan=True
    )


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_more", [False, True])
@pytest.mark.parametrize("heads, kv_heads, d", [(1, 1, 2), (5, 3, 64), (4, 2, 10)])
def test_interpreted_rotation_of_normed_heads(heads, kv_heads, d, one_more, dtype):
    from kernels.layer import layer_triton as triton_layer

    rows = 3
    qkv, angle = normal(rows, (heads + 2 * kv_heads) * d, dtype=dtype), normal(rows, d, dtype=torch.float32)
    inputs = qkv, angle.cos().to(dtype), angle.sin().to(dtype)
    norms = normal(d, dtype=dtype), normal(d + 1, dtype=dtype)[1:]
    got = triton_layer.split_rotated(*inputs, heads, kv_heads, triton_layer.HeadNorms(*norms, 1e-5, one_more))
    plain = layer.split_normed_rotated(*inputs, heads, kv_heads, (*norms, 1e-5, one_more))
    exact = layer.split_normed_rotated(
        *(x.double() for x in inputs), heads, kv_heads, (*(x.double() for x in norms), 1e-5, one_more)
    )
    for own, torchs, true in zip(got, plain, exact, strict=True):
        assert_as_good_as_torch(own, torchs, true)
    assert torch.equal(got[2], plain[2])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "heads, kv_heads, d, room, used", [(1, 1, 2, 1, 1), (5, 3, 64, 7, 7), (4, 2, 10, 5, 3)]
)
def test_interpreted_rotation_into_a_cache(heads, kv_heads, d, room, used, normed, dtype):
    """The same bits as without places go to place used - 1 of each row's heads, and nowhere else."""
    from kernels.layer import layer_triton as triton_layer

    rows = 3
    qkv, angle = normal(rows, (heads + 2 * kv_heads) * d, dtype=dtype), normal(rows, d, dtype=torch.float32)
    inputs = qkv, angle.cos().to(dtype), angle.sin().to(dtype), heads, kv_heads
    norms = None
    if normed:
        norms = triton_layer.HeadNorms(normal(d, dtype=dtype), normal(d, dtype=dtype), 1e-5, False)
    keys, values = torch.full((2, rows, kv_heads, room, d), torch.nan, dtype=dtype)
    query, none, no_value = triton_layer.split_rotated(
        *inputs, norms, Places(keys, values, torch.tensor([used]))
    )
    assert none is no_value is None
    wanted = triton_layer.split_rotated(*inputs, norms)
    for got, want in zip((query, keys[:, :, used - 1], values[:, :, used - 1]), wanted, strict=True):
        assert torch.equal(got, want)
    for slab in (keys, values):
        assert int(slab.isnan().sum()) == rows * kv_heads * (room - 1) * d


def gradients(function, leaves, upstream) -> list[torch.Tensor]:
    """Returns the gradients of all leaves, for the same upstream numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return list(
        torch.autograd.grad(
            out, leaves, [u[: o.numel()].view_as(o).to(o) for o, u in zip(out, upstream, strict=False)]
        )
    )


def assert_gradients(own, torchs, leaves) -> None:
    """Asserts that an op's gradients are as good as those of torch's code in the same dtype."""
    upstream = [normal(4096 + i, dtype=torch.float64) for i in range(3)]
    got, plain = (gradients(function, leaves, upstream) for function in (own, torchs))
    exact = gradients(torchs, [x.double() for x in leaves], upstream)
    for values in zip(got, plain, exact, strict=True):
        assert_as_good_as_torch(*values)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, scale", [(1, 2, 1e-2), (3, 577, 1e2), (7, 64, 1e-2)])
def test_interpreted_gradients_of_the_norm(rows, width, scale, dtype, monkeypatch):
    from kernels.layer import layer_gradients

    monkeypatch.setattr(layer_gradients, "PROGRAMS", 3)
    x, delta, weight = (
        normal(*shape, dtype=dtype, scale=s)
        for shape, s in (((rows, width), scale), ((rows, width + 1), scale), ((width,), 1.0))
    )

    def plain(x, delta, weight):
        total = x + delta
        return total, F.rms_norm(total, (width,), weight, 1e-5)

    leaves = x, delta[:, 1:], weight
    assert_gradients(lambda *given: layer_gradients.rms_norm(*given, 1e-5), plain, leaves)
    assert_gradients(
        lambda x, weight: layer_gradients.rms_norm(x, None, weight, 1e-5)[1],
        lambda x, weight: F.rms_norm(x, (width,), weight, 1e-5),
        (x, weight),
    )
    assert_gradients(
        lambda *given: layer_gradients.rms_norm(*given, 1e-5, True),
        lambda *given: layer.add_rms_norm_one_more(*given, 1e-5),
        leaves,
    )
    # Behind the last layer only the norm is used.
    assert_gradients(
        lambda *given: layer_gradients.rms_norm(*given, 1e-5)[1], lambda *given: plain(*given)[1], leaves
    )
    assert_gradients(
        lambda *given: layer_gradients.rms_norm(*given, weight.to(x), 1e-5)[0],
        lambda x, delta: x + delta,
        leaves[:2],
    )
    # Frozen weights, as beside an adapter: a program for each row.
    assert_gradients(
        lambda x: layer_gradients.rms_norm(x, None, weight.to(x), 1e-5)[1],
        lambda x: F.rms_norm(x, (width,), weight.to(x), 1e-5),
        (x,),
    )


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, d", [(1, 1, 2), (9, 3, 64), (4, 2, 10)])
def test_interpreted_gradients_of_rotation_and_split(heads, kv_heads, d, dtype):
    from kernels.layer import layer_gradients

    qkv, angle = (
        normal(2, (heads + 2 * kv_heads) * d, dtype=dtype),
        normal(2, d, dtype=torch.float32, scale=3.0),
    )

    def of(function):
        return lambda qkv: function(
            qkv, angle.cos().to(dtype).to(qkv), angle.sin().to(dtype).to(qkv), heads, kv_heads
        )

    assert_gradients(of(layer_gradients.split_rotated), of(layer.split_rotated), (qkv,))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (2, 1030)])
def test_interpreted_gradients_of_the_gate(rows, width, dtype):
    from kernels.layer import layer_gradients

    gate_up = normal(rows, 2 * width, dtype=dtype, scale=5.0)
    assert_gradients(layer_gradients.gated_silu, layer.gated_silu, (gate_up,))
    assert_gradients(lambda x: layer_gradients.gated(x, True), layer.gated_gelu, (gate_up,))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_forward_of_gelu_and_of_norms_with_one_more(dtype):
    from kernels.layer import layer_triton as triton_layer

    gate_up = normal(3, 514, dtype=dtype, scale=5.0)
    exact = layer.gated_gelu(gate_up.double())
    assert_as_good_as_torch(triton_layer.gated(gate_up, True), layer.gated_gelu(gate_up), exact)
    x, delta, weight = (
        normal(3, 257, dtype=dtype),
        normal(3, 258, dtype=dtype)[:, 1:],
        normal(257, dtype=dtype),
    )
    total, normed = triton_layer.rms_norm(x, delta, weight, 1e-5, True)
    plain = layer.add_rms_norm_one_more(x, delta, weight, 1e-5)
    exact = layer.rms_norm_one_more(total.double(), weight.double(), 1e-5)
    assert_as_good_as_torch(normed, plain[1], exact)


@compiled
def test_kernels_compile_for_sm_90():
    pytest.importorskip("triton")
    from bench import sm90

    chosen = [
        x
        for x in sm90.layer_kernels()
        if x.dtype == "bf16"
        and x.name.removesuffix(", backward").removesuffix(", weights too").removesuffix(", backward")
        in ("norm of 4096, added", "rotate 32 + 8 of 128", "gate")
    ]
    assert len(chosen) == 7
    for kernel in chosen:
        assert not sm90.failures(kernel, sm90.compiled(kernel)), kernel


def test_who_serves():
    pytest.importorskip("triton")
    from kernels.layer import layer_triton as triton_layer

    def asked(dtype=torch.bfloat16, is_cuda=True, rows=3, step=1, other=torch.bfloat16):
        x = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, numel=lambda: 8 * rows, stride=lambda i: step)
        return triton_layer.serves(x, SimpleNamespace(dtype=other))

    assert asked() and asked(torch.float32, other=torch.float32)
    for unusable in (
        {"dtype": torch.float64, "other": torch.float64},
        {"is_cuda": False},
        {"rows": 0},
        {"step": 2},
        {"other": torch.float32},
    ):
        assert not asked(**unusable)
