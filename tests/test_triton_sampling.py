"""The Triton sampling kernels in Triton's interpreter, against float64 and the plain torch path; and a compile for sm_90.

The interpreter runs in a process of its own, because Triton chooses it on import.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from kernels import sample  # noqa: E402
from kernels.sampling import combine, uniform  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_interpreter starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter cannot")


def by_triton(logits, u, temperature=1.0, part=4096):
    from kernels import triton_sampling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_sampling, "PART", part)
        return triton_sampling.sample_rows(logits, u, temperature)


def logits_of(rows: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * scale


def edge_distance(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Distance of u from the nearest edge of the cumulative distribution, float64 [R]."""
    return (logits.double().softmax(1).cumsum(1) - u[:, None]).abs().amin(1)


def exact_logprob(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(1).gather(1, token[:, None])[:, 0]


@compiled
def test_interpreter():
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@compiled
def test_kernels_compile_for_sm_90():
    from bench import sm90

    for kernel in sm90.sampling_kernels():
        if kernel.dtype == "bf16":
            assert not sm90.failures(kernel, sm90.compiled(kernel)), kernel


@interpreted
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("columns,part", [(7, 4096), (1000, 4096), (1000, 128), (5003, 4096), (5003, 1024)])
def test_tokens_and_log_probs_are_those_of_plain_torch(columns, part, temperature, monkeypatch):
    logits, key = logits_of(8, columns), torch.arange(8)
    token, logprob = by_triton(logits, uniform(key, 3), temperature, part)
    exact = logits.double() / temperature
    assert torch.equal(token, (exact.softmax(1).cumsum(1) > uniform(key, 3)[:, None]).int().argmax(1))
    assert edge_distance(exact, uniform(key, 3)).amin() > 1e-6, "no row of this seed may depend on rounding"
    monkeypatch.setattr("kernels.native.available", False)
    twin, twin_logprob, _ = sample(logits, key=key, step=3, temperature=temperature)
    assert torch.equal(token, twin)
    torch.testing.assert_close(logprob, twin_logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logprob.double(), exact_logprob(exact, token), rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("part", [2, 8])
def test_every_token_of_a_short_row_is_reached_at_its_edges(part):
    logits = logits_of(1, 7)
    edges = logits.double().softmax(1).cumsum(1)[0]
    below = torch.cat([torch.zeros(1, dtype=torch.float64), edges[:-1]])
    for u in (below + 1e-6, edges - 1e-6):
        assert by_triton(logits.expand(7, 7), u, part=part)[0].tolist() == list(range(7))


def chi_square(token: torch.Tensor, bins: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Of drawn tokens against p [V], tokens summed by bins [V]."""
    expected = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins, p) * len(token)
    counts = torch.bincount(bins[token], minlength=len(expected)).double()
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


@interpreted
@pytest.mark.parametrize("columns,part,rows", [(7, 8, 120), (1000, 512, 50), (5003, 4096, 40)])
def test_distribution(columns, part, rows):
    logits = logits_of(1, columns, 1.5)
    p = (logits[0].double() / 0.8).softmax(0)
    # The tokens of the shortest row, bins of about equal mass of the others.
    bins = torch.arange(columns) if columns < 10 else (p.cumsum(0) * 4).long().unique(return_inverse=True)[1]
    token, _ = by_triton(logits.expand(rows, -1), uniform(combine(7, torch.arange(rows)), 3), 0.8, part)
    statistic, degrees = chi_square(token, bins, p)
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


@interpreted
@pytest.mark.parametrize("u", [2.0**-54, 0.5, 1.0])
def test_a_token_without_mass_is_never_drawn(u):
    only = torch.tensor([0, 31, 32, 50, 69])
    logits = torch.full((5, 70), -torch.inf)
    logits[:, 5] = -200.0  # exp(-197) is 0 in float32
    logits[torch.arange(5), only] = -3.0
    token, logprob = by_triton(logits, torch.full((5,), u, dtype=torch.float64), part=32)
    assert torch.equal(token, only) and bool((logprob == 0).all())


@interpreted
def test_offset_of_2_to_the_24_changes_nothing():
    # Multiples of 2 stay exact under this offset.
    logits, u = (logits_of(6, 100).round() * 2).clamp(-20, 20), uniform(torch.arange(6), 1)
    for a, b in zip(by_triton(logits, u, part=32), by_triton(logits + 2.0**24, u, part=32), strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 40, 69])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_reaches_the_results_of_its_own_row_only(bad, place):
    logits = logits_of(4, 70)
    logits[1, place] = bad
    logits[2] = -torch.inf
    token, logprob = by_triton(logits, uniform(torch.arange(4), 0), part=32)
    assert logprob.isnan().tolist() == [False, True, True, False] and token[1:3].tolist() == [0, 0]


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_and_rows_apart(dtype):
    padded, u = logits_of(5, 96).to(dtype), uniform(torch.arange(5), 2)
    padded[:, 70:] = 100
    for a, b in zip(by_triton(padded[:, :70], u, part=32), by_triton(padded[:, :70].float().contiguous(), u, part=32), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_greedy_takes_the_first_of_the_likeliest():
    logits = logits_of(5, 70).clamp(max=3).round()
    token, logprob = by_triton(logits, None, part=32)
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any(), "some row must have equals"
    torch.testing.assert_close(logprob.double(), exact_logprob(logits, token), rtol=1e-6, atol=1e-6)


@interpreted
def test_no_rows():
    token, logprob = by_triton(torch.empty(0, 7), torch.empty(0, dtype=torch.float64))
    assert token.shape == logprob.shape == (0,)
