"""Rows taken by index: values and gradients against float64, and the order in which gradients are added."""

import pytest
import torch

from kernels import gather
from kernels.gather import Picks, sums_of_places, take
from tests.helpers.interpreter import compiled, interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of 7 are taken in no order: one often, some never.
INDEX = torch.tensor([3, 0, 3, 6, 3, 3, 1, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3])


def gradient_of(rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows)).to(dtype)


def one_by_one(gradient: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Adds up row by row, in the dtype of the gradient."""
    total = gradient.new_zeros(rows, *gradient.shape[1:])
    for place, row in enumerate(index.tolist()):
        total[row] += gradient[place]
    return total


@pytest.mark.parametrize("index", [INDEX, INDEX[:0]], ids=["some", "none"])
@pytest.mark.parametrize("dtype", DTYPES + [torch.float64], ids=str)
def test_a_gradient_is_added_up_wide_and_rounded_once(dtype, index):
    gradient, picks = gradient_of(len(index), (2, 5), dtype), Picks.of(index, 7)
    got = sums_of_places(gradient, picks.order, picks.ends)
    wide = one_by_one(gradient.to(torch.promote_types(dtype, torch.float32)), index, 7)
    assert torch.equal(got, wide.to(dtype))
    if dtype.itemsize == 2 and len(index):
        exact = one_by_one(gradient.double(), index, 7)
        narrow = one_by_one(gradient, index, 7)
        assert (got.double() - exact).abs().max() < (narrow.double() - exact).abs().max()


def test_the_backward_pass_of_a_gpu_is_that_of_index_select():
    """It runs on a GPU alone; here it is called as it would be there."""
    picks, upstream = Picks.of(INDEX, 7), gradient_of(len(INDEX), (4,), torch.float64)
    found = []
    functions = lambda x: gather._Take.apply(x, picks.index, picks.order, picks.ends), lambda x: x[INDEX]
    for function in functions:
        source = gradient_of(7, (4,), torch.float64).requires_grad_()
        out = function(source)
        found.append((out.detach(), *torch.autograd.grad(out, source, upstream)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-14)


def test_on_a_cpu_rows_are_taken_and_added_as_torch_does():
    source, picks = gradient_of(7, (4,), torch.bfloat16).requires_grad_(), Picks.of(INDEX, 7)
    upstream = gradient_of(len(INDEX), (4,), torch.bfloat16)
    (own,) = torch.autograd.grad(take(source, picks), source, upstream)
    (torchs,) = torch.autograd.grad(source.index_select(0, INDEX), source, upstream)
    assert torch.equal(own, torchs)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 5), (1030,)], ids=str)
def test_interpreted_sums(dtype, shape):
    from kernels import gather_triton

    gradient, picks = gradient_of(len(INDEX), shape, dtype), Picks.of(INDEX, 7)
    got = gather_triton.sums_of_places(gradient, picks.order, picks.ends)
    exact = one_by_one(gradient.double(), INDEX, 7)
    # The interpreter cuts bfloat16 off instead of rounding it.
    assert (got.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert not got[[2, 4, 5]].any() and got.dtype == dtype
    assert not gather_triton.sums_of_places(gradient[:0], picks.order[:0], 0 * picks.ends).any()


@compiled
def test_the_kernel_compiles_for_sm_90():
    pytest.importorskip("triton")
    from bench import sm90

    (kernel,) = [x for x in sm90.gather_kernels() if x.dtype == "bf16"]
    assert not sm90.failures(kernel, sm90.compiled(kernel))
