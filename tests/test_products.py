"""Products with frozen matrices against float64, and what they leave to torch."""

import pytest
import torch
import torch.nn.functional as F

from kernels import native, products


def made(rows: int, width: int, columns: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows + width + columns)
    return (torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, width), (columns, width), (columns,)))


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """As on a processor that is not Intel's."""
    monkeypatch.setattr(products, "MKL_IS_FASTER", False)
    monkeypatch.setattr(products, "PANEL_ROWS", 0)


def test_mkl_does_the_products_where_it_is_faster_but_not_those_of_few_rows(monkeypatch):
    x, weight, bias = made(33, 64, 48)
    out = torch.empty(33, 48)
    assert products.serves(x, weight) and products.times_transposed(x, weight, out=out) is out
    torch.testing.assert_close(out, x @ weight.t())
    monkeypatch.setattr(products, "MKL_IS_FASTER", True)
    assert not products.serves(x, weight)
    assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
    assert products.times_transposed(x, weight, out=out) is out and torch.equal(out, torch.mm(x, weight.t()))
    with torch.no_grad():
        few = products.linear(x[:4], weight, bias)
        monkeypatch.setattr(products, "MKL_IS_FASTER", False)
        if products.FEW_ROWS:
            assert torch.equal(products.linear(x[:4], weight, bias), few)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (16, 577, 129), (64, 577, 129), (385, 576, 1536)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_against_float64(shape, with_bias):
    x, weight, bias = made(*shape)
    bias = bias if with_bias else None
    x.requires_grad_()
    out = products.linear(x, weight, bias)
    assert out.grad_fn.name().startswith("_Linear")  # oneDNN's, not torch's own
    x64 = x.detach().double().requires_grad_()
    exact = F.linear(x64, weight.double(), None if bias is None else bias.double())
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (own,), (true,) = torch.autograd.grad(out, x, gradient), torch.autograd.grad(exact, x64, gradient.double())
    for got, want, terms in ((out, exact, shape[1]), (own, true, shape[2])):
        bound = 4 * torch.finfo(torch.float32).eps * terms**0.5
        assert (got.detach().double() - want.detach()).abs().max() <= bound * max(1.0, float(want.detach().abs().max()))
    with torch.no_grad():
        first, again = products.linear(x, weight, bias), products.linear(x, weight, bias)
    assert torch.equal(first, again)
    # A few rows are summed in another order.
    bound = 4 * torch.finfo(torch.float32).eps * shape[1] ** 0.5 * max(1.0, float(exact.detach().abs().max()))
    assert torch.equal(first, out) or (shape[0] <= products.FEW_ROWS and (first.double() - exact).abs().max() <= bound)


@pytest.mark.skipif(not native.available, reason="no compiled kernels")
@pytest.mark.parametrize("width, columns", [(1, 1), (15, 2), (16, 3), (33, 7), (577, 64)])
def test_few_rows_have_one_result_for_any_rows_threads_and_instructions(width, columns):
    """And each instruction set's own is right; the sum of products of 1 has no rounding."""
    x, weight, bias = made(19, width, columns)
    threads = torch.get_num_threads()
    for instructions in native.instructions:
        whole = products.few_rows(x, weight, bias, instructions)
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert (whole - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * width**0.5 * max(1.0, float(exact.abs().max()))
        assert torch.equal(products.few_rows(x.sign(), weight.sign(), None, instructions), F.linear(x.sign(), weight.sign()))
        assert torch.equal(whole, products.few_rows(x, weight, bias, native.instructions[0]))
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for rows in (1, 3, 8, 9):
                    assert torch.equal(products.few_rows(x[-rows:], weight, bias, instructions), whole[-rows:])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.skipif(native.instructions[:1] != ("avx512",), reason="no AVX-512")
@pytest.mark.parametrize("width, columns", [(1, 1), (15, 2), (16, 48), (33, 49), (577, 100), (2048, 16), (4100, 65)])
def test_panels_have_one_result_for_any_rows_and_threads(width, columns):
    """Widths beyond 2048 are added up in several parts."""
    x, weight, bias = made(19, width, columns)
    threads = torch.get_num_threads()
    whole = products.panels(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (whole - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * width**0.5 * max(1.0, float(exact.abs().max()))
    assert torch.equal(products.panels(x.sign(), weight.sign(), None), F.linear(x.sign(), weight.sign()))
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for rows in (1, 8, 9):
                assert torch.equal(products.panels(x[-rows:], weight, bias), whole[-rows:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(native.instructions[:1] != ("avx512",), reason="no AVX-512")
def test_panels_serve_up_to_their_number_of_rows(monkeypatch):
    x, weight, bias = made(41, 64, 48)
    monkeypatch.setattr(products, "PANEL_ROWS", 40)
    with torch.no_grad():
        assert torch.equal(products.linear(x[:40], weight, bias), products.panels(x[:40], weight, bias))
        assert torch.equal(products.linear(x[:7], weight, bias), products.few_rows(x[:7], weight, bias, "avx512"))
        assert torch.equal(products.linear(x, weight, bias), products.times_transposed(x, weight, bias))
        strided = weight.t().contiguous().t()
        assert torch.equal(products.linear(x[:40], strided, bias), products.times_transposed(x[:40], strided, bias))
    x.requires_grad_()
    assert products.linear(x[:40], weight, bias).requires_grad


@pytest.mark.skipif(not products.FEW_ROWS, reason="no compiled kernels")
def test_few_rows_refuse_what_does_not_agree():
    x, weight, bias = made(3, 6, 5)
    for wrong in ((x[:, :5], weight, bias), (x, weight, bias[:4])):
        with pytest.raises(ValueError, match="are wanted"):
            products.few_rows(*wrong, native.instructions[0])
        with pytest.raises(ValueError, match="are wanted"):
            products.panels(*wrong)


def test_strided_inputs_and_a_second_derivative():
    x, weight, _ = made(12, 10, 8)
    wide = torch.zeros(12, 20)
    wide[:, ::2] = x
    torch.testing.assert_close(products.linear(wide[:, ::2], weight.t().contiguous().t()), F.linear(x, weight))
    x.requires_grad_()
    y = products.linear(x, weight).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 * torch.ones(12, 10) @ weight.t() @ weight), rtol=1e-4, atol=1e-4)


def test_the_rest_is_left_to_torch(monkeypatch):
    x, weight, bias = made(4, 6, 5)
    x.requires_grad_()

    def name(*arguments):
        return products.linear(*arguments).grad_fn.name()

    assert not products.serves(x.double(), weight.double()) and "_Linear" not in name(x.double(), weight.double())
    assert "_Linear" not in name(x, weight.clone().requires_grad_()) and "_Linear" not in name(x, weight, bias.clone().requires_grad_())
    assert "_Linear" not in name(x.bfloat16(), weight.bfloat16())
    assert products.linear(x[:0], weight).shape == (0, 5) and products.linear(x[:, :0], weight[:, :0], bias).tolist() == [bias.tolist()] * 4
    with torch.backends.mkldnn.flags(enabled=False):
        assert "_Linear" not in name(x, weight)


def test_a_caller_compiles_in_one_graph():
    x, weight, bias = made(4, 6, 5)
    x.requires_grad_()
    compiled = torch.compile(lambda y: products.linear(y, weight, bias).square().sum(), fullgraph=True, backend="aot_eager")
    (own,), (true,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(F.linear(x, weight, bias).square().sum(), x)
    torch.testing.assert_close(own, true)
