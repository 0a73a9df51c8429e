"""The Triton sampling kernels in Triton's interpreter, against float64 and the plain torch path;
and a compile for sm_90."""

import math

import pytest
import torch

from tests.helpers.interpreter import compiled, interpreted

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from kernels import sample  # noqa: E402
from kernels.random import combine, exponential, stream  # noqa: E402
from kernels.sampling.draw import sample_with_gap  # noqa: E402
from kernels.sampling.draw_triton import _log_exponential  # noqa: E402


@triton.jit
def write_log_exponential(p_stream, p_out, COUNT: tl.constexpr):
    o = tl.arange(0, COUNT)
    tl.store(p_out + o, _log_exponential(o, tl.load(p_stream)))


def by_triton(logits, streams, temperature=1.0, part=4096):
    """Returns token, model_logprob and gap of plain sampling by the Triton kernels."""
    token, logprob, model_logprob, gap = truncated_by_triton(logits, streams, temperature, 0, 1.0, part)
    assert torch.equal(
        logprob.nan_to_num(), torch.zeros_like(gap) if streams is None else model_logprob.nan_to_num()
    )
    return token, model_logprob, gap


def truncated_by_triton(logits, streams, temperature, top_k, top_p, part):
    from kernels.sampling import draw_triton as triton_sampling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_sampling, "PART", part)
        patch.setattr(triton_sampling, "ROW_BLOCK", part)
        return triton_sampling.sample_rows(logits, streams, temperature, top_k, top_p)


def logits_of(rows: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * scale


def exact_logprob(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(1).gather(1, token[:, None])[:, 0]


@interpreted
def test_streams_are_those_of_torch():
    from kernels.sampling import draw_triton

    key = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), *combine(3, torch.arange(300)).tolist()])
    for step in (0, 7, torch.tensor([5]), torch.tensor(6)):
        assert torch.equal(draw_triton.streams(key, step), stream(key, step))
    assert len(draw_triton.streams(key[:0], 3)) == 0


@interpreted
@pytest.mark.parametrize("feed_last", [False, True])
@pytest.mark.parametrize("stop", [[], [3], [3, 5]], ids=str)
def test_what_a_step_keeps_of_its_tokens(stop, feed_last):
    """Rows 0 and 4 of a batch of six have been dropped; row 2 has ended, and may hold anything."""
    from kernels.sampling.record_triton import Drawn, Kept, State, record

    drawn = Drawn(
        torch.tensor([3, 5, 7, 5]),
        torch.tensor([-1.0, math.nan, -3.0, -4.0]),
        torch.tensor([-1.5, -2.5, -3.5, -4.5]),
        torch.tensor([1e-5, 1e-5, math.nan, 1.0]),
    )
    floats = [torch.full((6, 4), 0.5) for _ in range(2)]
    kept = Kept(
        torch.full((6, 4), 9), *floats, torch.zeros(6, 4).bool(), torch.full((6,), 2), torch.zeros(6).bool()
    )
    row, alive = torch.tensor([1, 2, 3, 5]), torch.tensor([True, False, True, True])
    state = State(row, torch.zeros(4, dtype=torch.int64), torch.zeros(4).bool(), alive.clone())
    record(drawn, kept, state, torch.tensor(stop, dtype=torch.int64), torch.tensor([2]), 1e-4, feed_last)
    for i, n in enumerate(row.tolist()):
        lives, token = bool(alive[i]), int(drawn.token[i])
        assert kept.tokens[n].tolist() == [9, 9, token if lives else 0, 9]
        assert kept.logprob[n, 2] == (drawn.logprob[i] if lives else 0)
        assert kept.model_logprob[n, 2] == (drawn.model_logprob[i] if lives else 0)
        assert bool(kept.near_tie[n, 2]) == (lives and float(drawn.gap[i]) < 1e-4)
        assert int(kept.length[n]) == 2 + lives and bool(kept.finished[n]) == (lives and token in stop)
        assert bool(state.alive[i]) == (lives and token not in stop)
        assert bool(state.fed[i]) == (lives and (feed_last or token not in stop))
    assert torch.equal(state.token, drawn.token) and torch.equal(state.row, row)
    assert (kept.tokens[[0, 4]] == 9).all() and (kept.length[[0, 4]] == 2).all()


@compiled
def test_kernels_compile_for_sm_90():
    from bench import sm90

    for kernel in sm90.sampling_kernels():
        if kernel.dtype == "bf16":
            assert not sm90.failures(kernel, sm90.compiled(kernel)), kernel


@interpreted
@pytest.mark.parametrize(
    "columns,part,temperature",
    [(7, 4096, 1.0), (1000, 4096, 0.7), (1000, 128, 1.0), (5003, 4096, 1.0), (5003, 1024, 0.7)],
)
def test_tokens_and_log_probs_are_those_of_plain_torch(columns, part, temperature, plain_torch):
    logits, key = logits_of(4, columns), torch.arange(4)
    token, logprob, gap = by_triton(logits, stream(key, 3), temperature, part)
    exact = logits.double() / temperature
    race = (exact - exponential(stream(key, 3), columns).log()).topk(2).values
    assert (race[:, 0] - race[:, 1]).amin() > 1e-5, "no row of this seed may depend on rounding"
    torch.testing.assert_close(gap.double(), race[:, 0] - race[:, 1], rtol=1e-6, atol=1e-5)
    twin, twin_logprob, _ = sample(logits, key=key, step=3, temperature=temperature)
    assert torch.equal(token, twin)
    torch.testing.assert_close(logprob, twin_logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logprob.double(), exact_logprob(exact, token), rtol=1e-6, atol=1e-6)


@interpreted
def test_exponential_numbers_are_those_of_plain_torch():
    seen = []
    for streams in (stream(torch.arange(40), 1), torch.tensor([0, -1, 1 << 40])):
        for i in range(len(streams)):
            out = torch.empty(1024)
            write_log_exponential[(1,)](streams[i : i + 1], out, COUNT=1024)
            torch.testing.assert_close(
                out.double(), exponential(streams[i : i + 1], 1024)[0].log(), rtol=1e-6, atol=2e-6
            )
            seen.append(out.exp())
    # The numbers cover both ways of making them, and the ends of each.
    seen = torch.cat(seen)
    assert seen.amin() < 1e-4 and seen.amax() > 9 and ((seen > 0.28) & (seen < 0.29)).sum() > 100


@interpreted
def test_distribution():
    """Longer rows, in one part and in several, have the tokens of plain torch, as the test above shows."""
    columns, rows = 7, 120
    logits = logits_of(1, columns, 1.5)
    p = (logits[0].double() / 0.8).softmax(0)
    token, _, _ = by_triton(logits.expand(rows, -1), stream(combine(7, torch.arange(rows)), 3), 0.8, 8)
    expected = p * rows
    statistic = float(((torch.bincount(token, minlength=columns) - expected) ** 2 / expected).sum())
    assert statistic < columns - 1 + 5 * math.sqrt(2 * (columns - 1))


# top_k keeps some of many, one, as many as there are, or more; top_p most of the mass, the likeliest, or
# little; the last case takes both.
TRUNCATIONS = [(5, 1.0), (1, 1.0), (33, 1.0), (10**6, 1.0), (0, 0.9), (0, 1e-6), (0, 0.3), (20, 0.8)]


@interpreted
@pytest.mark.parametrize(
    "columns,kind,dtype,truncation",
    [(33, "plain", torch.float32, x) for x in TRUNCATIONS]
    + [
        (columns, kind, dtype, x)
        for columns, kind, dtype in (
            (33, "equals", torch.bfloat16),
            (33, "no mass", torch.float16),
            (7, "flat", torch.float32),
        )
        for x in ((5, 1.0), (0, 0.9), (20, 0.8))
    ],
)
def test_truncated_sampling_is_that_of_plain_torch(columns, kind, dtype, truncation, plain_torch):
    (top_k, top_p), logits, key = truncation, logits_of(2, columns).to(dtype), torch.arange(2)
    if kind == "equals":
        logits = logits.round()
    if kind == "flat":
        logits[:] = 0.25
    if kind == "no mass":
        logits[:, 1::3] = -torch.inf
    assert_is_the_twin_s(
        truncated_by_triton(logits, stream(key, 3), 0.7, top_k, top_p, 32), logits, key, top_k, top_p
    )


@interpreted
@pytest.mark.parametrize("top_k,top_p", [(300, 1.0), (0, 0.9), (300, 0.7)])
def test_truncated_sampling_of_many_tokens(top_k, top_p, plain_torch):
    logits, key = logits_of(2, 5003), torch.arange(2)
    assert_is_the_twin_s(
        truncated_by_triton(logits, stream(key, 3), 0.7, top_k, top_p, 2048), logits, key, top_k, top_p
    )


def assert_is_the_twin_s(got, logits, key, top_k, top_p):
    """Asserts that a draw is that of plain torch.

    A log-prob among the tokens kept holds the mass of the kept set, and a token's own holds the ties.
    """
    want = sample_with_gap(logits, key=key, step=3, temperature=0.7, top_k=top_k, top_p=top_p)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("top_k,top_p,kept", [(5, 1.0, 5), (0, 0.8, 8), (7, 0.5, 4), (9, 0.95, 9)])
def test_of_equals_the_first_are_kept(top_k, top_p, kept):
    """There are 10 equals after one unlikely token, in parts of 8: 0.8 of 10 is 8 exactly."""
    logits, rows = torch.zeros(1, 11), 3
    logits[:, 0] = -torch.inf
    token, logprob, model_logprob, _ = truncated_by_triton(
        logits.expand(rows, -1), stream(torch.arange(rows), 1), 1.0, top_k, top_p, 8
    )
    assert set(token.tolist()) <= set(range(1, kept + 1))
    torch.testing.assert_close(logprob, torch.full([rows], -math.log(kept)))
    torch.testing.assert_close(model_logprob, torch.full([rows], -math.log(10)))


@interpreted
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_token_without_mass_is_never_drawn(step):
    only = torch.tensor([0, 31, 32, 50, 69])
    logits = torch.full((5, 70), -torch.inf)
    logits[:, 5] = -200.0  # exp(-197) is 0 in float32
    logits[torch.arange(5), only] = -3.0
    token, logprob, gap = by_triton(logits, stream(torch.arange(5), step), part=32)
    assert torch.equal(token, only) and bool((logprob == 0).all()) and bool((gap > 80).all())


@interpreted
def test_offset_of_2_to_the_24_changes_nothing():
    # Multiples of 2 stay exact under this offset.
    logits, streams = (logits_of(6, 100).round() * 2).clamp(-20, 20), stream(torch.arange(6), 1)
    for a, b in zip(
        by_triton(logits, streams, part=32), by_triton(logits + 2.0**24, streams, part=32), strict=True
    ):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_reaches_the_results_of_its_own_row_only():
    """NaN and inf stand in the first part of a row, in its middle and at its end; one row is all -inf."""
    logits = logits_of(9, 70)
    for row, place in enumerate((0, 40, 69)):
        logits[1 + row, place], logits[4 + row, place] = torch.nan, torch.inf
    logits[7] = -torch.inf
    for top_k, top_p in ((0, 1.0), (9, 0.9)):
        token, logprob, model_logprob, gap = truncated_by_triton(
            logits, stream(torch.arange(9), 0), 1.0, top_k, top_p, 32
        )
        assert (
            logprob.isnan().tolist()
            == model_logprob.isnan().tolist()
            == gap.isnan().tolist()
            == [False, *[True] * 7, False]
        )
        assert token[1:8].tolist() == [0] * 7


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_and_rows_apart(dtype):
    padded, streams = logits_of(5, 96).to(dtype), stream(torch.arange(5), 2)
    padded[:, 70:] = 100
    for a, b in zip(
        by_triton(padded[:, :70], streams, part=32),
        by_triton(padded[:, :70].float().contiguous(), streams, part=32),
        strict=True,
    ):
        assert torch.equal(a, b)


@interpreted
def test_greedy_takes_the_first_of_the_likeliest():
    logits = logits_of(5, 70).clamp(max=3).round()
    token, logprob, gap = by_triton(logits, None, part=32)
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]
    two = logits.topk(2).values
    assert torch.equal(gap, two[:, 0] - two[:, 1])
    assert (gap == 0).any(), "some row must have equals"
    torch.testing.assert_close(logprob.double(), exact_logprob(logits, token), rtol=1e-6, atol=1e-6)


@interpreted
def test_no_rows():
    token, logprob, gap = by_triton(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert token.shape == logprob.shape == gap.shape == (0,)
