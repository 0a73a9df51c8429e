"""Decode attention against `kernels.reference`: in plain torch, and the Triton
kernels in Triton's interpreter."""

import pytest
import torch

from kernels import decode_attention
from kernels.attention.decode import store
from kernels.attention.records import Caches, Score
from tests.helpers.decode import OPTIONS, assert_as_good_as_torch, dense, problem
from tests.helpers.interpreter import compiled, interpreted


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_torch_is_dense_attention(options):
    data = problem(dtype=torch.float64)
    torch.testing.assert_close(
        decode_attention(**data, **options), dense(data, options), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_torch_rounds_once(dtype):
    data = problem(dtype=dtype)
    torch.testing.assert_close(
        decode_attention(**data), dense(data, {}).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize(
    "groups,length", [((0, 0, 0), (4, 4, 4)), ((0, 2, 0), (3, 0, 1)), ((1,), (1,))], ids=str
)
def test_plain_torch_of_few_rows_and_empty_prompts(groups, length):
    data = problem(groups, length, used=1, dtype=torch.float64)
    torch.testing.assert_close(decode_attention(**data), dense(data, {}), rtol=1e-12, atol=1e-12)


def test_store_puts_the_token_before_the_count():
    own, data = [torch.full((2, 3, 4, 5), torch.nan) for _ in range(2)], torch.randn(2, 2, 3, 5)
    for used in (1, 4):
        store(*own, *data, torch.tensor([used]))
        for slab, x in zip(own, data, strict=True):
            assert torch.equal(slab[:, :, used - 1], x)
    assert own[0].isnan().sum() == own[1].isnan().sum() == 2 * 3 * 2 * 5


@pytest.mark.parametrize(
    "change,message",
    [
        ({"prompt_values": torch.zeros(3, 2, 19, 16)}, "prompt_values has shape"),
        ({"own_keys": torch.zeros(5, 1, 8, 16)}, "own_keys has shape"),
        ({"own_keys": torch.zeros(5, 2, 16, 8).transpose(2, 3)}, "own_keys has strides"),
        ({"query": torch.zeros(5, 3, 16)}, "query has 3 heads"),
        ({"query": torch.zeros(5, 4, 16, dtype=torch.float16)}, "prompt_keys has dtype"),
        ({"used": torch.tensor([9])}, "used"),
        ({"used": torch.tensor(5)}, "used has shape"),
        ({"prompt_length": torch.tensor([20, 21, 5])}, "prompt_length"),
        ({"owner_offsets": torch.tensor([0, 3, 2, 5])}, "owner_offsets"),
        ({"owner_offsets": torch.tensor([0, 2, 2, 4])}, "owner_offsets"),
        ({"window": 0}, "window = 0"),
        ({"softcap": -1.0}, "softcap = -1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**problem() | change)


def test_parts_fill_the_processors_and_are_not_too_short():
    decode_triton = pytest.importorskip("kernels.attention.decode_triton", reason="needs triton")
    for programs, longest, window, parts in (
        (1, 4096, None, 32),
        (8, 4096, None, 32),
        (64, 4096, None, 4),
        (64, 4096, 200, 2),
        (500, 4096, None, 1),
        (1, 100, None, 1),
        (1, 0, None, 1),
    ):
        assert decode_triton.parts_of(longest, window, programs) == parts


@compiled
def test_kernels_compile_for_sm_90():
    pytest.importorskip("triton")
    from bench import sm90

    chosen = [
        x
        for x in sm90.decode_kernels()
        if x.dtype == "bf16" and x.constants["WIDTH"] == 64 and "softcap" not in x.name
    ]
    assert len(chosen) == 6
    for kernel in chosen:
        assert not sm90.failures(kernel, sm90.compiled(kernel)), kernel


@pytest.fixture
def poisoned():
    """Makes torch fill what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def by_triton(data: dict, scale=None, softcap=None, window=None, **plan) -> torch.Tensor:
    from kernels.attention import decode_triton

    plan = {"shared": decode_triton.INTERPRETED, "own": decode_triton.INTERPRETED} | plan
    query = data["query"]
    caches = Caches(**{name: x for name, x in data.items() if name != "query"})
    score = Score(query.shape[2] ** -0.5 if scale is None else scale, softcap, window)
    return decode_triton.decode_attention(query, caches, score, decode_triton.Plan(**plan))


@interpreted
@pytest.mark.parametrize("options,parts", [({}, 1)] + [(x, 3) for x in OPTIONS], ids=str)
def test_interpreted_options(options, parts, poisoned):
    """Windows end within the own tokens, at their edge, in the prompt and past it;
    some parts have no tokens."""
    data = problem((1, 0, 2), (40, 9, 17), kv_heads=1, heads=2)
    assert_as_good_as_torch(by_triton(data, **options, parts=parts), data, options)


SHAPES = {
    "one row each, used 1": dict(groups=(1, 1, 1), used=1),
    "all room used": dict(used=24, room=24),
    "MHA, groups of 1 and 8": dict(groups=(1, 8), length=(3, 17), kv_heads=2, heads=2),
    "several blocks of queries": dict(groups=(0, 5, 1, 0, 4), length=(5, 18, 1, 3, 16), kv_heads=1, heads=5),
    "a prompt of no tokens": dict(groups=(1, 2), length=(0, 4)),
    "d 80": dict(width=80, kv_heads=1, heads=3),
    "d 8": dict(width=8, kv_heads=1),
    "more heads a key head than 16": dict(groups=(1, 2), length=(4, 2), kv_heads=1, heads=17),
}


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_interpreted_shapes(shape, poisoned):
    from kernels.attention import decode_triton

    data = problem(**shape)
    group = data["query"].shape[1] // data["own_keys"].shape[1]
    own = decode_triton.INTERPRETED._replace(queries=16 if group <= 16 else 32)
    assert_as_good_as_torch(by_triton(data, parts=2, own=own), data, {})


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 256])
def test_interpreted_dtypes_by_the_rules(dtype, width, poisoned):
    """Tiles and parts are chosen as on a GPU."""
    data = problem((2, 0, 6), (70, 9, 150), heads=3, kv_heads=1, width=width, room=70, used=66, dtype=dtype)
    assert_as_good_as_torch(by_triton(data, shared=None, own=None, window=90), data, {"window": 90})


@interpreted
def test_interpreted_twice_is_bitwise_equal():
    data = problem((1, 2), (40, 17), dtype=torch.bfloat16)
    assert torch.equal(by_triton(data, parts=2), by_triton(data, parts=2))


@interpreted
def test_interpreted_large_scores():
    """Scores lie far beyond what exp takes without a maximum, in the prompt and in the own tokens."""
    data = problem(dtype=torch.float32)
    data["prompt_keys"] *= 300
    data["own_keys"][0] *= 600
    # Scores of some hundreds are rounded to 1e-5, by which weights differ with the order of their sums.
    assert_as_good_as_torch(by_triton(data, parts=2), data, {}, rounding=1e-5)


@interpreted
def test_interpreted_store():
    from kernels.attention import decode_triton

    own, data = torch.full((2, 2, 3, 4, 5), torch.nan), torch.randn(2, 2, 3, 5)
    twin = own.clone()
    for used in (1, 4):
        decode_triton.store(*own, *data, torch.tensor([used]))
        store(*twin, *data, torch.tensor([used]))
    assert torch.equal(own.nan_to_num(7), twin.nan_to_num(7))
