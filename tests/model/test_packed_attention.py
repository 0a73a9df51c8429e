"""Compiled attention among packed tokens against float64 run by run, and against what sampling computes."""

import pytest
import torch

from engine.model import attention
from engine.model.attention import Layout, attend_packed
from engine.rollout.cache import SharedCache
from kernels import compiled
from tests.helpers.attention import HOW, LAYOUTS, by_runs

pytestmark = pytest.mark.skipif(not compiled.instructions, reason="kernels._native is not built")
# Prompts and responses of more than a block of 16 tokens, of none and of whole blocks; more rows than a tile.
LARGER = LAYOUTS | {
    "long groups": lambda: Layout.shared_prompt([40, 0, 17, 16], [[33, 0, 65], [3, 18], [16, 16], [32]]),
    "one long": lambda: Layout.packed(torch.tensor([0, 150])),
}
EMPTY = {"none": [0], "two of none": [0, 0, 0]}
FURTHER = [*HOW, {"window": 17, "softcap": 1.5}, {"window": 16}]


def inputs(tokens: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Makes query, key, value, and the gradient of the result."""
    g = torch.Generator().manual_seed(tokens + d)
    return [torch.randn(tokens, n, d, generator=g).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def with_gradients(function, tensors, gradient) -> list[torch.Tensor]:
    """Returns function(*tensors) and its gradients, in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, gradient))]


def exact(layout: Layout, how: dict, query, key, value, gradient) -> list[torch.Tensor]:
    """Computes the result and the gradients run by run in float64."""
    runs = layout.runs

    def attend(q, k, v):
        k, v = (x if runs.key is None else x.index_select(0, runs.key.index) for x in (k, v))
        return by_runs(q, k, v, runs.cu_query.tolist(), runs.cu_key.tolist(), **how)

    return with_gradients(attend, [x.double() for x in (query, key, value)], gradient.double())


@pytest.mark.parametrize("how", FURTHER, ids=str)
@pytest.mark.parametrize("name", LARGER)
def test_values_and_gradients_are_those_of_float64(monkeypatch, name, how):
    """In float32 the errors are those of torch on the padded grid or smaller, in bfloat16 one rounding."""
    layout = LARGER[name]()
    windowed, options = layout.windowed(how.get("window")), (how.get("scale"), how.get("softcap"))

    def attend(q, k, v):
        return attend_packed(q, k, v, windowed, *options)

    for heads, kv_heads, d in ((9, 3, 64), (6, 2, 7), (1, 1, 1), (5, 1, 80)):
        for dtype in (torch.float32, torch.bfloat16):
            *tensors, gradient = inputs(len(layout.position), heads, kv_heads, d, dtype)
            found, wanted = with_gradients(attend, tensors, gradient), exact(layout, how, *tensors, gradient)
            beside = wanted
            if dtype == torch.float32:
                with monkeypatch.context() as plain:
                    plain.setattr(compiled, "make", compiled.MAKES["none"])
                    beside = with_gradients(attend, tensors, gradient)
            rounding = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5001)
            for one, other, x in zip(found, beside, wanted, strict=True):
                error, its = (float((y - x).abs().max()) for y in (one, other))
                # Sums of gradients that should be 0 are so to float32's rounding.
                assert error <= 2 * its + rounding * float(x.abs().max()) + 1e-6


@pytest.mark.parametrize("name", EMPTY)
def test_no_tokens(name):
    layout = Layout.packed(torch.tensor(EMPTY[name]))
    *tensors, gradient = inputs(0, 9, 3, 64, torch.float32)
    found = with_gradients(lambda q, k, v: attend_packed(q, k, v, layout, None, None), tensors, gradient)
    assert [tuple(x.shape) for x in found] == [(0, 9, 64), (0, 9, 64), (0, 3, 64), (0, 3, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 2**62), (1.5, 9)])
def test_same_bits_for_every_thread_count_and_instruction_set(dtype, softcap, window):
    layout = LARGER["long groups"]()
    *tensors, gradient = inputs(len(layout.position), 9, 3, 64, dtype)
    results = []
    for instructions in compiled.instructions:
        for threads in (1, 2, 3):
            given = *tensors, *layout.runs.prompts, 0.125, softcap, window
            out, *gradients = (torch.empty_like(x) for x in (tensors[0], *tensors))
            compiled._native.packed_attention(*given, out, threads, instructions)
            compiled._native.packed_attention_gradients(*given, gradient, *gradients, threads, instructions)
            results.append([out, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", FURTHER, ids=str)
def test_a_token_has_the_bits_that_it_had_when_it_was_sampled(dtype, how):
    """So in 16 bits, too, what is trained starts at what was sampled."""
    lengths, n, steps = [40, 5, 16], 2, 35
    layout = Layout.shared_prompt(lengths, [[steps] * n for _ in lengths])
    for heads, kv_heads, d in ((9, 3, 64), (4, 1, 20)):
        *tensors, _ = inputs(len(layout.position), heads, kv_heads, d, dtype)
        options = how.get("scale"), how.get("softcap")
        packed = attend_packed(*tensors, layout.windowed(how.get("window")), *options).flatten(1)
        begins, prompt_of = layout.runs.prompts
        prompts = [run for run in range(len(prompt_of)) if prompt_of[run] == run]
        of_prompts = torch.cat([torch.arange(begins[run], begins[run + 1]) for run in prompts])
        kept = [tuple(x[of_prompts] for x in tensors[1:])]
        cache = SharedCache(kept, torch.tensor([0, *lengths]).cumsum(0), n, steps)
        rows = torch.tensor([int(begins[run]) for run in range(len(prompt_of)) if run not in prompts])
        for step in range(steps):
            q, k, v = (x[rows + step] for x in tensors)
            assert torch.equal(cache.attend(0, q, k, v, **how), packed[rows + step]), (d, step)
            cache.advance()


def test_who_attends(monkeypatch):
    """Compiled code takes what it serves; float64 and float16 go to the grid."""
    layout, grids = LAYOUTS["groups"](), []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *given: grids.append(given[0].dtype) or attend(*given))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        *tensors, _ = inputs(len(layout.position), 2, 1, 8, dtype)
        attend_packed(*tensors, layout, None, None)
    assert grids == [torch.float64, torch.float32]
    monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
    *tensors, _ = inputs(len(layout.position), 2, 1, 8, torch.float32)
    attend_packed(*tensors, layout, None, None)
    assert len(grids) == 3


def test_bad_calls():
    *tensors, _ = inputs(9, 4, 2, 8, torch.float32)
    begins, prompt_of = torch.tensor([0, 4, 9]), torch.tensor([0, 0])

    def call(q, k, v, begins=begins, prompt_of=prompt_of, window=5):
        compiled._native.packed_attention(
            q, k, v, begins, prompt_of, 1.0, 0.0, window, torch.empty_like(q), 1, compiled.instructions[0]
        )

    call(*tensors)
    q, k, v = tensors
    for change, said in (
        ({"k": k[:8]}, "shapes do not agree"),
        ({"v": v[:, :1].contiguous()}, "shapes do not agree"),
        ({"begins": torch.tensor([0, 9])}, "shapes do not agree"),
        ({"q": torch.zeros(9, 3, 8)}, "query heads must be a multiple"),
        ({"window": 0}, "the window is empty"),
        ({"begins": torch.tensor([0, 4, 8])}, "the runs are not all tokens"),
        ({"begins": torch.tensor([0, 10, 9])}, "a run has less than no token"),
        ({"prompt_of": torch.tensor([0, 2])}, "a run is not behind its prompt"),
        ({"prompt_of": torch.tensor([1, 1])}, "a run is not behind its prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            call(**({"q": q, "k": k, "v": v} | change))
