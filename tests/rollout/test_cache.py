"""The compiled shared cache against the slab with torch's attention, and against float64."""

import pytest
import torch

from bench.run.measure import peak_bytes
from engine.rollout.cache import Cache, GpuCache, SharedCache, new_cache
from kernels import compiled
from kernels.attention.decode_native import BlockedCache

needs_native = pytest.mark.skipif(not compiled.instructions, reason="kernels._native is not built")


def prefilled(lengths, kv_heads, d, layers=1, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    kept = [
        tuple(torch.randn(sum(lengths), kv_heads, d, generator=g).to(dtype) for _ in range(2))
        for _ in range(layers)
    ]
    return kept, cu_seqlens, g


def exact(kept, cu_seqlens, n, history, query, scale=None, softcap=None, window=None):
    """Computes the attention of the last token of each row in float64.

    history: (key, value) [R, Hkv, d] of the row's tokens so far.
    """
    rows, bounds = [], cu_seqlens.tolist()
    for r, q in enumerate(query.double()):
        p = r // n
        keys, values = (
            torch.cat([x[bounds[p] : bounds[p + 1]], torch.stack([step[i][r] for step in history])]).double()
            for i, x in enumerate(kept)
        )
        group = len(q) // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("hd,thd->ht", q, keys) * (q.shape[1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if window is not None:
            scores[:, :-window] = -torch.inf
        weight = scores.softmax(1)
        rows.append(torch.einsum("ht,thd->hd", weight, values).flatten())
    return torch.stack(rows)


@needs_native
@pytest.mark.parametrize("heads,kv_heads,d", [(9, 3, 64), (2, 2, 16), (6, 1, 20), (4, 1, 7), (5, 1, 128)])
@pytest.mark.parametrize("lengths", [(16, 3, 31), (1,)])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scale": 0.05},
        {"softcap": 2.0},
        {"window": 1},
        {"window": 16},
        {"window": 17},
        # The window passes the prompt's end, and one is longer than everything.
        {"window": 30, "softcap": 0.7, "scale": 0.1},
        {"window": 100},
    ],
    ids=str,
)
def test_both_caches_agree_with_float64(heads, kv_heads, d, lengths, how):
    kept, cu_seqlens, g = prefilled(lengths, kv_heads, d)
    n, room, rows = 3, 35, 3 * len(lengths)
    caches, history = [kind(kept, cu_seqlens, n, room) for kind in (Cache, SharedCache)], []
    # One more that keeps only what new tokens see.
    caches.append(SharedCache(kept, cu_seqlens, n, room, [how.get("window")]))
    for _ in range(room):
        query = torch.randn(rows, heads, d, generator=g) * 3
        history.append([torch.randn(rows, kv_heads, d, generator=g) for _ in range(2)])
        want = exact(kept[0], cu_seqlens, n, history, query, **how)
        for cache in caches:
            torch.testing.assert_close(
                cache.attend(0, query, *history[-1], **how).double(), want, rtol=1e-5, atol=1e-5
            )
            cache.advance()


@needs_native
@pytest.mark.parametrize("heads,kv_heads,d", [(9, 3, 64), (6, 1, 20), (4, 1, 7), (5, 1, 128)])
@pytest.mark.parametrize("lengths", [(16, 3, 31), (1,)])
@pytest.mark.parametrize("how", [{}, {"window": 30, "softcap": 0.7, "scale": 0.1}], ids=str)
def test_bfloat16_is_rounded_once(heads, kv_heads, d, lengths, how):
    """Scores, weights and sums are float32: what is left is the rounding of the result."""
    kept, cu_seqlens, g = prefilled(lengths, kv_heads, d, dtype=torch.bfloat16)
    n, room, rows = 3, 35, 3 * len(lengths)
    cache, history = SharedCache(kept, cu_seqlens, n, room), []
    for _ in range(room):
        query = (torch.randn(rows, heads, d, generator=g) * 3).bfloat16()
        history.append([torch.randn(rows, kv_heads, d, generator=g).bfloat16() for _ in range(2)])
        want = exact(kept[0], cu_seqlens, n, history, query, **how)
        mixed = cache.attend(0, query, *history[-1], **how)
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.double(), want, rtol=2**-8 * (1 + 2**-10), atol=1e-5)
        cache.advance()


@pytest.mark.parametrize("kind", [Cache, SharedCache, GpuCache])
def test_dropped_rows_are_not_held_beside_those_that_stay(kind):
    kept, cu_seqlens, _ = prefilled((5, 20), 2, 16, layers=8)

    def peak(rows: int) -> int:
        def step() -> None:
            kind(kept, cu_seqlens, 16, 400).keep(torch.arange(rows))

        return peak_bytes(step, torch.device("cpu"))

    layer = 2 * 32 * 2 * 400 * 16 * 4  # bytes of 32 rows' tokens
    assert peak(16) < peak(0) + layer


@needs_native
def test_dropped_rows_and_layers():
    kept, cu_seqlens, g = prefilled((5, 20), 2, 16, layers=2)
    caches = [kind(kept, cu_seqlens, 4, 9) for kind in (Cache, SharedCache)]
    rows = torch.arange(8)
    for step in range(9):
        if step in (2, 6):
            keep = torch.tensor([0, 1, 4, 5]) if step == 2 else torch.tensor([1, 3])
            rows = rows[keep]
            for cache in caches:
                cache.keep(keep)
        for layer in range(2):
            query = torch.randn(len(rows), 4, 16, generator=g)
            key, value = (torch.randn(len(rows), 2, 16, generator=g) for _ in range(2))
            one, two = (cache.attend(layer, query, key, value) for cache in caches)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        for cache in caches:
            cache.advance()


@pytest.mark.parametrize("kind", [pytest.param(SharedCache, marks=needs_native), GpuCache])
def test_a_window_keeps_what_new_tokens_see(kind):
    """It never mixes up the layers, each of which has its own window here."""
    kept, cu_seqlens, g = prefilled((5, 20, 1), 2, 16, layers=3)
    windows = [None, 6, 1]
    whole, cut = Cache(kept, cu_seqlens, 2, 9), kind(kept, cu_seqlens, 2, 9, windows)
    assert [x[1].shape[2] for x in cut.prompts] == [20, 5, 1]
    assert [x[2].tolist() for x in cut.prompts] == [[5, 20, 1], [5, 5, 1], [1, 1, 1]]
    for _ in range(9):
        for layer, window in enumerate(windows):
            query = torch.randn(6, 4, 16, generator=g)
            key, value = (torch.randn(6, 2, 16, generator=g) for _ in range(2))
            one, two = (cache.attend(layer, query, key, value, window=window) for cache in (whole, cut))
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        whole.advance()
        cut.advance()


@needs_native
def test_peaked_scores_stay_finite():
    kept, cu_seqlens, g = prefilled((3,), 1, 16)
    cache = SharedCache(kept, cu_seqlens, 1, 2)
    key = torch.full((1, 1, 16), 100.0)
    mixed = cache.attend(0, key * 10, key, torch.ones(1, 1, 16))
    torch.testing.assert_close(mixed, torch.ones(1, 16))


@needs_native
def test_small_and_large_scores_under_a_cap():
    """With two keys the weight is the sigmoid of the difference of the capped scores,
    to a few units in the last place of these."""
    kept, cu_seqlens, _ = prefilled((1,), 1, 16)
    kept[0][0].zero_()
    kept[0][1].fill_(1.0)
    for score in (0.0, 1e-6, -1e-6, 1e-3, -0.3, 2.0, -17.0, 300.0, -1e5):
        cache, key = SharedCache(kept, cu_seqlens, 1, 1), torch.zeros(1, 1, 16)
        key[..., 0] = score
        query = torch.zeros(1, 1, 16)
        query[..., 0] = 1.0
        mixed = cache.attend(0, query, key, torch.zeros(1, 1, 16), scale=1.0, softcap=5.0)
        want = torch.sigmoid(-5 * torch.tanh(torch.tensor(score, dtype=torch.float64) / 5))
        assert abs(float(mixed[0, 0]) - float(want)) < 2e-7, score


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 2**62), (1.5, 9)])
def test_same_bits_for_every_thread_count_instruction_set_and_batch(softcap, window, dtype):
    kept, cu_seqlens, g = prefilled((7, 19, 30), 3, 64, dtype=dtype)
    query, key, value = (torch.randn(12, heads, 64, generator=g).to(dtype) for heads in (9, 3, 3))
    results = []
    score = (0.125, softcap, window)
    for instructions in compiled.instructions:
        for threads in (1, 2):
            cache, out = SharedCache(kept, cu_seqlens, 4, 5), torch.empty_like(query)
            tensors = BlockedCache(*cache.prompts[0], cache.owner, *cache.rows[0], used=0)
            compiled._native.decode_attention(query, key, value, *tensors, *score, out, threads, instructions)
            results.append(out)
    alone = SharedCache(kept, cu_seqlens, 4, 5)
    alone.keep(torch.tensor([5]))
    results.append(
        torch.cat(
            [
                results[0][:5],
                alone.attend(
                    0, query[5:6], key[5:6], value[5:6], softcap=softcap or None, window=window
                ).view(1, 9, 64),
                results[0][6:],
            ]
        )
    )
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_native
def test_bad_calls():
    kept, cu_seqlens, g = prefilled((4,), 2, 16)
    cache = SharedCache(kept, cu_seqlens, 2, 3)
    query, key = torch.zeros(2, 4, 16), torch.zeros(2, 2, 16)
    with pytest.raises(ValueError, match="shapes do not agree"):
        cache.attend(0, query[:1], key, key)
    with pytest.raises(ValueError, match="the window is empty"):
        cache.attend(0, query, key, key, window=0)
    cache.used = 3
    with pytest.raises(ValueError, match="the cache is full"):
        cache.attend(0, query, key, key)


def test_who_attends():
    kept, cu_seqlens, _ = prefilled((4,), 1, 16)
    native = SharedCache if compiled.instructions else Cache
    for dtype, kind in ((torch.float32, native), (torch.bfloat16, native), (torch.float16, Cache)):
        pairs = [tuple(x.to(dtype) for x in pair) for pair in kept]
        assert isinstance(new_cache(pairs, cu_seqlens, 1, 2), kind)
