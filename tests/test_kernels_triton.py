"""The Triton row kernel: values and gradients in Triton's interpreter, and a compile for sm_90.

The interpreter runs in a process of its own, because Triton chooses it on import.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from kernels import lagrangian, loss_head, sequence_logprob  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_interpreter starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter cannot")


@pytest.fixture(autouse=True)
def triton_rows(monkeypatch):
    """The ops do their rows with Triton, on the CPU."""
    from kernels.triton_rows import TritonRows

    for module in (loss_head, lagrangian):
        monkeypatch.setattr(module, "row_workspace", lambda hidden: TritonRows)


def token_logprob(hidden, weight, target, bias=None, temperature=1.0, softcap=None, budget=None):
    """log p of every row."""
    cu_seqlens = torch.tensor([0, len(target)])
    options = {"temperature": temperature, "softcap": softcap, "memory_budget_bytes": budget}
    return sequence_logprob(hidden, weight, target, cu_seqlens, bias=bias, return_token_logprob=True, **options)[1]


@compiled
def test_interpreter():
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@compiled
@pytest.mark.parametrize("jacobian", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("has_bias,has_softcap", [(False, False), (True, True)])
def test_compiles_for_sm_90_without_spills(tmp_path, jacobian, has_bias, has_softcap):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.triton_rows import TritonRows, row_kernel

    signature = {
        "p_logits": "*fp32",
        "p_jacobian": jacobian,
        "p_bias": jacobian,
        "p_target": "*i64",
        "p_logprob": "*fp32",
        "p_scale": "*fp32",
        "vocabulary": "i32",
        "logits_stride": "i32",
        "jacobian_stride": "i32",
        "temperature": "fp32",
        "softcap": "fp32",
        "HAS_BIAS": "constexpr",
        "HAS_SOFTCAP": "constexpr",
        "JACOBIAN": "constexpr",
        "BLOCK_V": "constexpr",
    }
    constants = {"HAS_BIAS": has_bias, "HAS_SOFTCAP": has_softcap, "JACOBIAN": True, "BLOCK_V": TritonRows.MAX_BLOCK}
    names = list(signature)
    aligned = ("p_logits", "p_jacobian", "p_bias", "vocabulary", "logits_stride", "jacobian_stride")
    source = ASTSource(
        fn=row_kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    cubin = tmp_path / "row.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    dump = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    usage = dict(part.split(":", 1) for part in dump.split("row_kernel:")[1].split() if ":" in part)
    assert int(usage["STACK"]) == 0 and int(usage["REG"]) <= 255, dump
    assert binary.metadata.shared <= 232448
    assert "ld.global.v4" in binary.asm["ptx"] or "v4.b32" in binary.asm["ptx"]


def dense(hidden, weight, target, bias, temperature, softcap):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(1).gather(1, target[:, None].long())[:, 0]


def run(function, leaves, needs, coefficient):
    for name in needs:
        leaves[name].requires_grad_()
    token = function(**leaves)
    (token * coefficient.to(token.dtype)).sum().backward()
    return {"token": token.detach()} | {name: leaves[name].grad for name in needs}


def check(data, needs, temperature=1.0, softcap=None, budget=None):
    """Triton's rows in the interpreter against dense float64, by the error rule of test_kernels_reference."""
    data = {"bias": None} | data
    coefficient = torch.linspace(-1, 1.5, len(data["target"]))
    needs = [name for name in needs if data[name] is not None]

    def copy(dtype=None):
        return {k: v.detach().clone().to(dtype) if v is not None and v.is_floating_point() else v for k, v in data.items()}

    def fused(hidden, weight, target, bias):
        return token_logprob(hidden, weight, target, bias, temperature, softcap, budget)

    def plain(hidden, weight, target, bias):
        return dense(hidden.float(), weight.float(), target, None if bias is None else bias.float(), temperature, softcap)

    got = run(fused, copy(), needs, coefficient)
    # The worst of three orders of the vocabulary, so that one lucky rounding does not set the bound.
    same = []
    for seed in range(3):
        order = torch.randperm(len(data["weight"]), generator=torch.Generator().manual_seed(seed))
        moved = copy()
        moved |= {k: moved[k][order] for k in ("weight", "bias") if moved[k] is not None} | {
            "target": order.argsort()[moved["target"].long()]
        }
        result = run(plain, moved, needs, coefficient)
        same.append({k: v[order.argsort()] if k in ("weight", "bias") else v for k, v in result.items()})
    exact = run(lambda **k: dense(**k, temperature=temperature, softcap=softcap), copy(torch.float64), needs, coefficient)
    for name, true in exact.items():
        scale = true.abs().max().clamp_min(1e-30).item()
        error = (got[name].double() - true).abs().max().item() / scale
        bound = max((x[name].double() - true).abs().max().item() for x in same) / scale
        assert error <= 2 * bound + 4 * torch.finfo(got[name].dtype).eps, f"{name}: {error} against {bound}"
    return got


def make(rows=9, width=8, vocabulary=33, dtype=torch.float32, bias=False):
    g = torch.Generator().manual_seed(3)
    data = {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": torch.randn(vocabulary, width, generator=g).to(dtype),
        "target": torch.randint(vocabulary, (rows,), generator=g),
    }
    data["target"][0] = vocabulary - 1
    return data | ({"bias": torch.randn(vocabulary, generator=g).to(dtype)} if bias else {})


NEEDS = pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])


@interpreted
@NEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 64, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"softcap": 2.0}, {"softcap": 30.0, "temperature": 1.7}, {"softcap": 1e4}], ids=str
)
def test_values_and_gradients(needs, dtype, vocabulary, options):
    check(make(vocabulary=vocabulary, dtype=dtype, bias=options.get("softcap") == 2.0), needs, **options)


@interpreted
@NEEDS
def test_several_blocks_and_chunks(needs, monkeypatch):
    from kernels.triton_rows import TritonRows

    monkeypatch.setattr(TritonRows, "MAX_BLOCK", 128)
    check(make(rows=11, vocabulary=300, bias=True), needs, budget=12000, softcap=4.0)
    check(make(rows=11, vocabulary=257), needs, budget=12000)


@interpreted
def test_all_negative_logits_and_a_ragged_last_block():
    """A tail read as 0 would add exp(0) to a row whose logits are all far below it; a maximum that starts at 0 would lose it."""
    data = {"hidden": -torch.ones(2, 1), "weight": torch.linspace(200, 300, 33)[:, None], "target": torch.tensor([0, 32])}
    check(data, ("hidden", "weight"))


@interpreted
def test_large_common_offset():
    data = {"hidden": torch.tensor([[2.0**24]]), "weight": torch.ones(2, 1), "target": torch.tensor([1])}
    assert check(data, ("hidden",))["token"].item() == pytest.approx(-math.log(2), rel=1e-6)


@interpreted
def test_minus_infinity(monkeypatch):
    """A whole first block of -inf, then a finite one; a target of -inf has log-prob -inf."""
    from kernels.triton_rows import TritonRows

    monkeypatch.setattr(TritonRows, "MAX_BLOCK", 16)
    data = make(bias=True)
    data["bias"][:16] = -math.inf
    data["target"] = data["target"].clamp(min=16)
    got = check(data, ("hidden", "weight", "bias"))
    assert all(x.isfinite().all() for x in got.values())
    token = token_logprob(data["hidden"], data["weight"], torch.zeros(9, dtype=torch.int64), data["bias"])
    assert (token == -math.inf).all()


@interpreted
def test_nan_spreads_and_int32_targets():
    data = make()
    data["hidden"][4, 0] = math.nan
    token = token_logprob(data["hidden"], data["weight"], data["target"].int(), None)
    assert token.isnan().tolist() == [i == 4 for i in range(9)]


@interpreted
@NEEDS
def test_sequences_and_token_weights(needs):
    data = make(bias=True)
    cu_seqlens = torch.tensor([0, 3, 3, 9])
    token_weight = torch.tensor([1, 0, 2, 0.5, 1, 0, 1, 1, 3.0])
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = {k: v.clone().to(dtype) if v.is_floating_point() else v for k, v in data.items()}
        for name in needs:
            leaves[name].requires_grad_()
        if dtype == torch.float32:
            total = sequence_logprob(**leaves, cu_seqlens=cu_seqlens, token_weight=token_weight)
        else:
            token = dense(**leaves, temperature=1.0, softcap=None) * token_weight
            total = torch.stack([token[:3].sum(), token[:0].sum(), token[3:].sum()])
        (total * torch.tensor([1.0, 5.0, -2.0], dtype=dtype)).sum().backward()
        results.append([total.detach().double(), *(leaves[name].grad.double() for name in needs)])
    assert results[0][0][1] == 0
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@interpreted
def test_float16_keeps_small_coefficients():
    """1e-9 rounds to 0 in float16; relative to the largest coefficient it does not. The bias is float32 to show it."""
    data = make(dtype=torch.float16)
    grads = []
    for scale in (1.0, 1e-9):
        bias = torch.zeros(33, requires_grad=True)
        token = token_logprob(data["hidden"], data["weight"], data["target"], bias)
        grads.append(torch.autograd.grad(token.sum() * scale, bias)[0])
    torch.testing.assert_close(grads[1] * 1e9, grads[0], rtol=1e-5, atol=1e-6)


@interpreted
def test_empty_batch():
    data = make(rows=1)
    hidden = data["hidden"][:0].requires_grad_()
    token = token_logprob(hidden, data["weight"], data["target"][:0], None)
    token.sum().backward()
    assert token.shape == (0,) and hidden.grad.shape == (0, 8)
