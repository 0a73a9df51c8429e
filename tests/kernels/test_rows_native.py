"""The compiled row arithmetic against float64 and against plain torch."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import compiled, reference, sample, sequence_logprob
from kernels.loss_head.records import Head
from kernels.loss_head.rows import Kept, Sums, TorchRows
from kernels.loss_head.rows_native import NativeRows
from kernels.loss_head.schemes import row_workspace
from kernels.random import exponential, stream
from kernels.sampling.draw import _truncate, sample_with_gap
from kernels.sampling.draw_native import sample_rows

# Blocks have 128 elements, tails are -inf: there are a short row, both sides of a block's end,
# an odd length and real vocabularies.
SIZES = [7, 127, 128, 129, 32001, 49152]
needs_native = pytest.mark.skipif(not compiled.instructions, reason="kernels._native is not built")


def logits_of(rows: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * scale


def exact_logprob(logits: torch.Tensor, token: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Computes log p from the sum of the others' mass in float64, which is exact
    also where p is close to 1."""
    shifted = (logits.double() - logits.double().gather(1, token[:, None])) / temperature
    others = shifted.scatter(1, token[:, None], -torch.inf).logsumexp(1)
    return -torch.nn.functional.softplus(others, threshold=1e9)


def exact_gradient(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    p = (logits.double() / temperature).softmax(1)
    others = p.scatter(1, target[:, None], 0.0)
    return others.scatter(1, target[:, None], -others.sum(1, keepdim=True)) / temperature


def rows_in_parts(logits, target, temperature, width=None, instructions=None, threads=2):
    """Returns log p [R] and J [R, V] of the compiled rows, made from `width` columns at a time."""
    instructions, width = instructions or compiled.instructions[0], width or logits.shape[1]
    rows, columns = logits.shape
    largest, own, logprob, scale = torch.full((4, rows), -torch.inf).unbind()
    others, state, jacobian = (
        torch.zeros(rows, dtype=torch.float64),
        torch.empty(rows, 3),
        torch.empty_like(logits),
    )
    parts = [slice(first, min(first + width, columns)) for first in range(0, columns, width)]
    kept = logits.clone()
    for part in parts:
        compiled._native.accumulate(
            kept[:, part],
            target,
            part.start,
            1 / temperature,
            largest,
            others,
            own,
            None,
            threads,
            instructions,
        )
    assert torch.equal(kept.nan_to_num(7), logits.nan_to_num(7))
    compiled._native.finish(1 / temperature, 1 / temperature, largest, others, own, logprob, state, scale)
    for part in parts:
        out = torch.empty(rows, part.stop - part.start)
        compiled._native.jacobian(
            kept[:, part],
            target,
            part.start,
            1 / temperature,
            state,
            torch.ones(rows),
            out,
            threads,
            instructions,
        )
        jacobian[:, part] = out
    return logprob, jacobian


def exact_gap(race: torch.Tensor) -> torch.Tensor:
    """Computes the gap between the logarithms of the two largest numbers of each row."""
    best = race.topk(min(2, race.shape[1])).values.log()
    return (
        best[:, 0] - best[:, -1]
        if race.shape[1] > 1
        else torch.full((len(race),), torch.inf, dtype=race.dtype)
    )


def clear_wins(logits: torch.Tensor, streams: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Tells the rows whose winner arrives at least 1e-5 of its time before the next, bool [R]."""
    arrival = exponential(streams, logits.shape[1]) / (logits.double() / temperature).softmax(1)
    first = arrival.topk(min(2, arrival.shape[1]), largest=False).values
    return (
        first[:, -1] > first[:, 0] * (1 + 1e-5)
        if arrival.shape[1] > 1
        else torch.ones(len(logits), dtype=torch.bool)
    )


def all_paths(call) -> list[tuple[torch.Tensor, ...]]:
    """Calls call(instructions, threads) for each instruction set of this processor, with 1 and 2 threads."""
    return [call(instructions, threads) for instructions in compiled.instructions for threads in (1, 2)]


def assert_same_bits(results: list[tuple[torch.Tensor, ...]]) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_those_of_plain_torch(columns, temperature):
    logits, streams = logits_of(64, columns), stream(torch.arange(64), 3)
    token, logprob, model_logprob, gap = sample_rows(logits, streams, temperature)
    race = (logits.double() / temperature).softmax(1) / exponential(streams, columns)
    clear = clear_wins(logits, streams, temperature)
    assert int(clear.sum()) >= 62 and torch.equal(token[clear], race.argmax(1)[clear])
    torch.testing.assert_close(logprob.double(), exact_logprob(logits, token, temperature), rtol=1e-6, atol=0)
    assert torch.equal(logprob, model_logprob) and torch.allclose(
        gap.double(), exact_gap(race), rtol=1e-6, atol=1e-5
    )


# They keep a few of many, most of the mass, all, one, more than there are, or both; some equals would be cut
# by only one of the two.
TRUNCATIONS = [
    (50, 1.0),
    (1000, 1.0),
    (0, 0.9),
    (0, 0.3),
    (0, 1e-6),
    (1, 1.0),
    (10**6, 1.0),
    (50, 0.9),
    (1000, 0.5),
    (10**6, 0.95),
]


@needs_native
@pytest.mark.parametrize(
    "columns,kind",
    [(columns, kind) for columns in SIZES[:4] for kind in ("plain", "equals", "no mass", "flat")]
    + [(32001, "equals"), (49152, "plain"), (49152, "flat")],
)
def test_kept_tokens_are_those_of_plain_torch(columns, kind):
    logits, streams = logits_of(6, columns, 2.0), stream(torch.arange(6), 4)
    if kind == "equals":
        logits = logits.round()
    if kind == "no mass":
        logits[:, 1::3] = -torch.inf
    if kind == "flat":
        logits = torch.full((6, columns), 0.25)
    for top_k, top_p in TRUNCATIONS:
        kept = torch.empty(6, columns) if top_p < 1 or top_k < columns else None
        token, logprob, model_logprob, gap = sample_rows(logits, streams, 0.8, top_k, top_p, kept)
        mass = ((logits - logits.amax(1, keepdim=True)).double() / 0.8).exp()
        ordered, order = mass.sort(dim=1, descending=True, stable=True)
        ordered[:, top_k or columns :] = 0
        # This is the mass before a token, among the tokens that top_k leaves.
        share = (ordered.cumsum(1) - ordered) / ordered.sum(1, keepdim=True)
        own = (ordered > 0) & ((share < top_p) | (top_p == 1))
        expected = torch.zeros_like(own).scatter_(1, order, own)
        if kept is not None:
            # Equal logits are exact; else rounding decides where the shares meet.
            sure = ((share - top_p).abs() > 1e-6 * top_p) | (top_p == 1) | (kind == "flat")
            for found in (kept, _truncate(mass.float(), top_p, top_k)):
                assert torch.equal((found > 0).gather(1, order)[sure], own[sure])
            assert int((~sure).sum(1).max()) < 20
            torch.testing.assert_close(kept.double(), torch.where(kept > 0, mass, 0), rtol=2e-6, atol=0)
            expected = kept > 0
        race = torch.where(expected, mass, 0) / exponential(streams, columns)
        assert torch.equal(token, race.argmax(1))
        torch.testing.assert_close(gap.double(), exact_gap(race), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            logprob.double(),
            exact_logprob(logits.where(expected, -torch.inf), token, 0.8),
            rtol=2e-6,
            atol=1e-12,
        )
        torch.testing.assert_close(
            model_logprob.double(), exact_logprob(logits, token, 0.8), rtol=2e-6, atol=1e-12
        )


@pytest.mark.parametrize("built", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (40, 1.0), (0, 0.8), (300, 0.7)])
def test_gap_of_the_two_best_perturbed_logits(built, top_k, top_p, monkeypatch):
    if not built:
        monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
    logits, key = logits_of(300, 1001), torch.arange(300)
    token, logprob, model_logprob, gap = sample_with_gap(
        logits, key=key, step=9, temperature=0.7, top_k=top_k, top_p=top_p
    )
    for a, b in zip(
        sample(logits, key=key, step=9, temperature=0.7, top_k=top_k, top_p=top_p),
        (token, logprob, model_logprob),
        strict=True,
    ):
        assert torch.equal(a, b)
    p = (logits.double() / 0.7).softmax(1)
    ordered, order = p.sort(dim=1, descending=True)
    ordered[:, top_k or 1001 :] = 0
    ordered[ordered.cumsum(1) - ordered >= top_p * ordered.sum(1, keepdim=True)] = 0
    race = torch.zeros_like(p).scatter_(1, order, ordered) / exponential(stream(key, 9), 1001)
    assert torch.equal(token, race.argmax(1)) and int((gap < 0.01).sum()) > 0
    torch.testing.assert_close(gap.double(), exact_gap(race), rtol=1e-6, atol=1e-5)
    greedy, two = (
        sample_with_gap(logits, key=key, step=9, temperature=0, top_k=top_k, top_p=top_p),
        logits.topk(2).values,
    )
    assert torch.equal(greedy[3], two[:, 0] - two[:, 1])
    for temperature in (0, 1.0):
        one = sample_with_gap(
            torch.zeros(1, 1), key=key[:1], step=0, temperature=temperature, top_k=top_k, top_p=top_p
        )
        assert [float(x) for x in one] == [0, 0, 0, torch.inf]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 40},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_k": 300, "top_p": 0.7},
    ],
)
def test_samples_are_those_of_the_definition(options, processor):
    logits, key = logits_of(200, 1001), torch.arange(200)
    got = sample(logits, key=key, step=9, **options)
    want = reference.sample(logits, exponential(stream(key, 9), 1001), **options)
    assert torch.equal(got[0], want[0])
    for x, true in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x.double(), true, rtol=2e-6, atol=2e-6)


@needs_native
def test_a_change_of_rounding_changes_no_token():
    """In a flat distribution most tokens have a probability below the rounding of a cumulative sum."""
    logits, streams = logits_of(200, 20_000), stream(torch.arange(200), 1)
    noise = 1 + 2e-7 * (torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    token, moved = (sample_rows(x, streams, 1.0)[0] for x in (logits, logits * noise))
    clear = clear_wins(logits, streams)
    assert int(clear.sum()) >= 199 and torch.equal(token[clear], moved[clear])


@needs_native
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_token_without_mass_is_never_drawn(step):
    for columns in (200, 256, 4000):
        logits = torch.full((columns, columns), -torch.inf).fill_diagonal_(-3.0)
        # This logit is so far below the largest that its mass is 0 in float32.
        logits[:, 5] = torch.where(torch.arange(columns) == 5, -3.0, -200.0)
        token, logprob, _, gap = sample_rows(logits, stream(torch.arange(columns), step), 1.0)
        assert torch.equal(token, torch.arange(columns))
        assert bool((logprob == 0).all()) and bool((gap == torch.inf).all())


@needs_native
def test_offset_of_2_to_the_24_changes_nothing():
    # Multiples of 2 stay exact under this offset.
    logits = (logits_of(16, 1000).round() * 2).clamp(-20, 20)
    streams = stream(torch.arange(16), 1)
    assert_same_bits([sample_rows(logits, streams, 1.0), sample_rows(logits + 2.0**24, streams, 1.0)])


@needs_native
def test_peaked_rows_keep_the_digits_of_small_log_probs():
    logits = logits_of(32, 32001, 1.0)
    target = torch.arange(32) * 997
    logits[torch.arange(32), target] = torch.linspace(20, 60, 32)
    token, logprob, _, _ = sample_rows(logits, stream(torch.arange(32), 0), 1.0)
    assert torch.equal(token, target)
    torch.testing.assert_close(logprob.double(), exact_logprob(logits, target), rtol=1e-6, atol=0)
    for width in (None, 1000):
        logprob, jacobian = rows_in_parts(logits, target, 1.0, width)
        torch.testing.assert_close(logprob.double(), exact_logprob(logits, target), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            jacobian.double(), exact_gradient(logits, target, 1.0), rtol=1e-5, atol=1e-37
        )


@needs_native
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("temperature,width", [(1.0, None), (0.7, None), (1.0, 128), (0.7, 51)])
def test_log_probs_and_gradient_rows(columns, temperature, width):
    logits = logits_of(16, columns)
    logits[3, columns // 2] = -torch.inf
    # The first part of a row holds nothing.
    logits[5, : columns // 2] = -torch.inf
    target = (torch.arange(16) * 7919) % columns
    target[5] = columns - 1
    logprob, jacobian = rows_in_parts(logits, target, temperature, width)
    torch.testing.assert_close(
        logprob.double(), exact_logprob(logits, target, temperature), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        jacobian.double(), exact_gradient(logits, target, temperature), rtol=1e-5, atol=1e-37
    )


@needs_native
def test_target_without_mass():
    logprob, jacobian = rows_in_parts(torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([1]), 0.5)
    assert logprob.item() == -torch.inf and jacobian[0, 1].item() == -2


@needs_native
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("budget", [1 << 30, 40_000])
def test_product_with_the_head_of_rows_whose_largest_logit_grows(softcap, budget, processor):
    """The running maximum of J W rises in many tiles; peaked rows keep their digits."""
    if processor.instructions is None:
        pytest.skip("plain torch has no tiles")
    hidden, weight = logits_of(9, 24, 1.0), logits_of(1000, 24, 1.0) * torch.linspace(0.1, 3, 1000)[:, None]
    target = torch.arange(9) * 111
    weight[222] = hidden[2] * 2
    head = Head(weight, None, 0.8, softcap)
    sizes = NativeRows.sizes(head, 9, budget, "product")
    assert (sizes.columns < 300) == (budget < 1 << 30)
    work, out = NativeRows(head, sizes, 9, "product"), torch.empty(9, 24)
    logprob = work.product(hidden, target, out)
    leaf = hidden.double().requires_grad_()
    logits = leaf @ weight.double().t()
    exact = exact_logprob(logits if softcap is None else softcap * torch.tanh(logits / softcap), target, 0.8)
    (gradient,) = torch.autograd.grad(exact.sum(), leaf)
    torch.testing.assert_close(logprob.double(), exact.detach(), rtol=2e-5, atol=1e-30)
    # The unit is each row's largest element: the smallest rows are 1e-7 of the largest.
    assert ((-out.double() - gradient).abs().amax(1) <= 1e-4 * gradient.abs().amax(1)).all()


@needs_native
def test_same_bits_for_every_thread_count_and_instruction_set():
    logits, streams, target = logits_of(37, 5001), stream(torch.arange(37), 2), torch.arange(37) * 131

    def sampled(instructions: str, threads: int, truncation: tuple[int, float]) -> tuple[torch.Tensor, ...]:
        token, floats = torch.empty(37, dtype=torch.int64), [torch.empty(37) for _ in range(3)]
        compiled._native.sample_rows(
            logits, streams, 1 / 0.9, *truncation, token, *floats, None, threads, instructions
        )
        return token, *floats

    def normalised(instructions: str, threads: int) -> tuple[torch.Tensor, ...]:
        return rows_in_parts(logits, target, 0.9, 1024, instructions, threads)

    for truncation in ((0, 1.0), (20, 1.0), (0, 0.8), (700, 0.9)):
        assert_same_bits(all_paths(partial(sampled, truncation=truncation)))
    assert_same_bits(all_paths(normalised))


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 130, 256])
def test_nan_reaches_the_results_of_its_own_row_only(bad, place):
    logits = logits_of(3, 257)
    logits[1, place] = bad
    for truncation in ((0, 1.0), (9, 1.0), (0, 0.9), (200, 0.9)):
        token, *floats = sample_rows(logits, stream(torch.arange(3), 0), 1.0, *truncation)
        assert [x.isnan().tolist() for x in floats] == [[False, True, False]] * 3
    assert 0 <= token[1] < 257
    # The target of the middle row is the bad place itself for place = 256.
    logprob, jacobian = rows_in_parts(logits, torch.full((3,), 256), 1.0, 128)
    assert logprob.isnan().tolist() == jacobian.isnan().any(1).tolist() == [False, True, False]


@needs_native
def test_row_without_finite_logits_is_nan():
    logits = torch.full((1, 130), -torch.inf)
    for truncation in ((0, 1.0), (9, 1.0), (0, 0.9)):
        assert all(x.isnan().all() for x in sample_rows(logits, torch.tensor([7]), 1.0, *truncation)[1:])
    assert rows_in_parts(logits, torch.tensor([0]), 1.0)[0].isnan().all()


@needs_native
@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (30, 1.0), (0, 0.9), (100, 0.8)])
def test_public_sample_agrees_with_plain_torch(top_k, top_p, monkeypatch):
    logits, key = logits_of(64, 1000), torch.arange(64)
    options = dict(key=key, step=5, temperature=0.8, top_k=top_k, top_p=top_p)
    token, logprob, model_logprob = sample(logits.requires_grad_(), **options)
    assert logprob.data_ptr() != model_logprob.data_ptr()
    monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
    expected = sample(logits.detach(), **options)
    same = token == expected[0]
    assert int(same.sum()) >= 62
    for value, twin in zip((logprob, model_logprob), expected[1:], strict=True):
        torch.testing.assert_close(value[same], twin[same], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequence_logprob_agrees_with_plain_torch(softcap, dtype, processor):
    hidden, weight = logits_of(9, 24).to(dtype), logits_of(300, 24, 0.3).to(dtype)
    target, bounds = torch.arange(9) * 33, torch.tensor([0, 4, 4, 9])
    results = []
    for op in (sequence_logprob, reference.sequence_logprob):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = op(*inputs, target, bounds, temperature=0.8, softcap=softcap)
        results.append((value, *torch.autograd.grad(value.sum(), inputs)))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for value, twin in zip(*results, strict=True):
        torch.testing.assert_close(value, twin, **tolerance)


def test_sequence_logprob_uses_the_compiled_rows_where_they_are(processor):
    workspace = TorchRows if processor.instructions is None else NativeRows
    assert row_workspace(torch.zeros(2, 3)) is workspace
    assert row_workspace(torch.zeros(2, 3, dtype=torch.float64)) is TorchRows


@needs_native
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_j_in_place_of_the_logits_gives_the_same_gradients(softcap, processor, monkeypatch):
    """The head has several parts and rows several tiles; one row has factor 0 and one no log-prob.

    The gradients are the same bit for bit where compiled code adds both kinds up. MKL adds what lies in place
    to the sum in steps of its own, so that there both kinds are as close to float64 as plain torch.
    """
    if processor.instructions is None:
        pytest.skip("plain torch has no tiles")
    monkeypatch.setattr(NativeRows, "TILE_ROWS", 4)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((9, 24), (333, 24), (333,)))
    target, factor = torch.randint(333, (9,), generator=g), torch.randn(9, generator=g)
    factor[2] = factor[5] = 0
    hidden[5] = torch.nan
    head = Head(weight, bias, 0.8, softcap)
    sizes = NativeRows.sizes(head, 9, 60_000, "kept")
    assert sizes.columns < 333 and sizes.tile_rows < 9
    results = []
    for kind in ("kept", "spent"):
        work = NativeRows(head, sizes, 9, kind)
        z, total = work.new_z(weight, 9), [torch.zeros(9, 24), torch.zeros(333, 24), torch.zeros(333)]
        logprob, state = work.keep(hidden, target, z)
        before = z.clone()
        work.add_gradients(Kept(z, state, target, hidden), factor, None, Sums(*total[:2], True, total[2]))
        assert torch.equal(z.nan_to_num(), before.nan_to_num()) == (kind == "kept")
        results.append([logprob[factor != 0], *total])
        assert all(x.isfinite().all() for x in results[-1])
    if processor.compiles_products:
        assert_same_bits(results)
    exact, plain = (
        dense_gradients(hidden, weight, bias, target, factor, 0.8, softcap, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for result in results:
        for x, near, true in zip(result, plain, exact, strict=True):
            bound = (
                2 * (near.double() - true).abs().max() + 4 * torch.finfo(torch.float32).eps * true.abs().max()
            )
            assert (x.double() - true).abs().max() <= bound


def dense_gradients(hidden, weight, bias, target, factor, temperature, softcap, dtype) -> list[torch.Tensor]:
    """Computes log p of the rows of a factor from whole logits, and the gradients of -sum factor log p
    in hidden, weight and bias."""
    used = factor != 0
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    logits = leaves[0][used] @ leaves[1].t() + leaves[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprob = (logits / temperature).log_softmax(1).gather(1, target[used][:, None])[:, 0]
    return [logprob.detach(), *torch.autograd.grad(-(logprob * factor[used].to(dtype)).sum(), leaves)]


def test_missing_module_is_said_once(plain_torch, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "_warned", False)
    for _ in range(2):
        assert not compiled.serves(torch.device("cpu"), torch.float32)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "\n" not in caplog.text.strip()


def test_other_rows_are_left_to_torch():
    assert not compiled.serves(torch.device("cpu"), torch.float64)
    assert not compiled.serves(torch.device("cuda"), torch.float32)


@needs_native
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_compiled_code_refuses_what_it_cannot_read():
    """It refuses another dtype, number of dimensions, layout in memory or device, what is no tensor,
    and a tensor without memory."""

    def halved(gate_up) -> torch.Tensor:
        out = torch.empty(3, 4)
        compiled._native.gated_silu(gate_up, out, 1, compiled.instructions[0])
        return out

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    want = reference_silu(x)
    torch.testing.assert_close(halved(x), want)
    # A part of a larger tensor and a tensor of a type of its own are lent as they are.
    torch.testing.assert_close(halved(torch.cat((x, x))[3:]), want)
    torch.testing.assert_close(halved(torch.nn.Parameter(x)), want)
    with FakeTensorMode():
        fake = torch.randn(3, 8)
    for wrong in (
        x.double(),
        x[0],
        torch.randn(3, 16)[:, ::2],
        x.t().contiguous().t(),
        x.to("meta"),
        x.numpy(),
        None,
        fake,
    ):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            halved(wrong)


def reference_silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
