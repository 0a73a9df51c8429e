"""Products with frozen matrices against float64, and what they leave to torch."""

import pytest
import torch
import torch.nn.functional as F

from kernels import compiled, products

has_pairs = pytest.mark.skipif(not compiled.multiplies_pairs, reason="no AVX512-BF16")
has_panels = pytest.mark.skipif(compiled.instructions[:1] not in (("avx512",), ("avx2",)), reason="no AVX2")


def made(rows: int, width: int, columns: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows + width + columns)
    return (
        torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, width), (columns, width), (columns,))
    )


@pytest.fixture
def amd(monkeypatch):
    """Pretends a processor that is not Intel's, where compiled code makes all products."""
    make = compiled.MAKES["amd" if "avx512" in compiled.instructions else "avx2"]
    monkeypatch.setattr(compiled, "make", make)
    return make


@has_panels
def test_mkl_does_the_products_where_it_is_faster_but_not_those_of_few_rows(amd, monkeypatch):
    x, weight, bias = made(133, 64, 48)
    out = torch.empty(133, 48)
    assert products.serves(x, weight) and products.times_transposed(x, weight, out=out) is out
    torch.testing.assert_close(out, x @ weight.t())
    with torch.no_grad():
        few = products.linear(x[:4], weight, bias)
    monkeypatch.setattr(
        compiled, "make", compiled.MAKES["intel" if amd.instructions == "avx512" else "intel, avx2"]
    )
    assert not products.serves(x, weight)
    assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
    assert products.times_transposed(x, weight, out=out) is out and torch.equal(out, torch.mm(x, weight.t()))
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight, bias), torch.mm(x, weight.t()) + bias)
        assert torch.equal(products.linear(x[:4], weight, bias), few)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (16, 577, 129), (64, 577, 129), (385, 576, 1536)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_against_float64(shape, with_bias, processor):
    x, weight, bias = made(*shape)
    bias = bias if with_bias else None
    x.requires_grad_()
    out = products.linear(x, weight, bias)
    assert out.grad_fn.name().startswith("_Linear") == processor.compiles_products  # ours, not torch's own
    x64 = x.detach().double().requires_grad_()
    exact = F.linear(x64, weight.double(), None if bias is None else bias.double())
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (own,), (true,) = (
        torch.autograd.grad(out, x, gradient),
        torch.autograd.grad(exact, x64, gradient.double()),
    )
    for got, want, terms in ((out, exact, shape[1]), (own, true, shape[2])):
        bound = 4 * torch.finfo(torch.float32).eps * terms**0.5
        assert (got.detach().double() - want.detach()).abs().max() <= bound * max(
            1.0, float(want.detach().abs().max())
        )
    with torch.no_grad():
        first, again = products.linear(x, weight, bias), products.linear(x, weight, bias)
    assert torch.equal(first, again)
    # A few rows are summed in another order, and where MKL multiplies many rows so are panels,
    # and a bias is added apart.
    bound = 4 * torch.finfo(torch.float32).eps * shape[1] ** 0.5 * max(1.0, float(exact.detach().abs().max()))
    apart = shape[0] <= max(processor.few_rows, processor.panel_rows or 0) or (
        with_bias and not processor.compiles_products
    )
    assert torch.equal(first, out) or (apart and (first.double() - exact).abs().max() <= bound)


@pytest.mark.parametrize("shape", [(64, 576, 1536), (64, 4096, 576), (256, 1536, 576)])
def test_sums_round_no_more_than_plain_torch_s(shape, processor):
    """Products have the width of a model, with the gradient and without.

    The root mean square error and the largest one are compared.
    """
    x, weight, _ = made(*shape)
    exact = x.double() @ weight.double().t()

    def errors(product: torch.Tensor) -> torch.Tensor:
        difference = (product.detach().double() - exact).abs()
        return torch.stack([difference.square().mean().sqrt(), difference.max()])

    plain = errors(x @ weight.t())
    with torch.no_grad():
        assert (errors(products.linear(x, weight)) <= 1.5 * plain).all()
    assert (errors(products.linear(x.requires_grad_(), weight)) <= 1.5 * plain).all()


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_products_are_added_to_a_total(rows, processor):
    """The columns of a matrix are summed in several steps, as the loss head does with J and the head."""
    x, matrix, _ = made(rows, 3000, 70)
    matrix = matrix.t().contiguous()
    total, exact = torch.full((rows, 70), torch.nan), torch.zeros(rows, 70, dtype=torch.float64)
    for first, part in ((True, slice(0, 1700)), (False, slice(1700, 1701)), (False, slice(1701, 3000))):
        products.add_product(total, x[:, part].contiguous(), matrix[part], first)
        exact += x[:, part].double() @ matrix[part].double()
        assert (total - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * 3000**0.5 * max(
            1.0, float(exact.abs().max())
        )


@pytest.mark.skipif(not compiled.instructions, reason="no compiled kernels")
@pytest.mark.parametrize("width, columns", [(1, 1), (15, 2), (16, 3), (33, 7), (577, 64)])
def test_few_rows_have_one_result_for_any_rows_threads_and_instructions(width, columns):
    """Each instruction set's own result is right as well; the sum of products of 1 has no rounding."""
    x, weight, bias = made(19, width, columns)
    threads = torch.get_num_threads()
    for instructions in compiled.instructions:
        whole = products.few_rows(x, weight, bias, instructions)
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert (whole - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * width**0.5 * max(
            1.0, float(exact.abs().max())
        )
        assert torch.equal(
            products.few_rows(x.sign(), weight.sign(), None, instructions), F.linear(x.sign(), weight.sign())
        )
        assert torch.equal(whole, products.few_rows(x, weight, bias, compiled.instructions[0]))
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for rows in (1, 3, 8, 9):
                    assert torch.equal(
                        products.few_rows(x[-rows:], weight, bias, instructions), whole[-rows:]
                    )
        finally:
            torch.set_num_threads(threads)


@has_panels
@pytest.mark.parametrize(
    "width, columns", [(1, 1), (15, 2), (16, 48), (33, 49), (577, 100), (2048, 16), (4100, 65)]
)
def test_panels_have_one_result_for_any_rows_threads_and_instructions(width, columns):
    """It is the same for a matrix that lies column by column; widths beyond 1024 are
    added up in several parts."""
    x, weight, bias = made(19, width, columns)
    threads, best = torch.get_num_threads(), compiled.instructions[0]
    whole = products.panels(x, weight, bias, best)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (whole - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * width**0.5 * max(
        1.0, float(exact.abs().max())
    )
    assert torch.equal(
        products.panels(x.sign(), weight.sign(), None, best), F.linear(x.sign(), weight.sign())
    )
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for instructions in compiled.instructions:
                for rows in (1, 8, 9, 19):
                    for matrix in (weight, weight.t().contiguous().t()):
                        assert torch.equal(
                            products.panels(x[-rows:], matrix, bias, instructions), whole[-rows:]
                        )
    finally:
        torch.set_num_threads(threads)


@has_panels
def test_panels_serve_up_to_their_number_of_rows(monkeypatch):
    x, weight, bias = made(41, 64, 48)
    best = compiled.instructions[0]
    monkeypatch.setattr(compiled, "make", compiled.Make(best, few_rows=8, panel_rows=40))
    with torch.no_grad():
        assert torch.equal(products.linear(x[:40], weight, bias), products.panels(x[:40], weight, bias, best))
        assert torch.equal(products.linear(x[:7], weight, bias), products.few_rows(x[:7], weight, bias, best))
        assert torch.equal(products.linear(x, weight, bias), products.times_transposed(x, weight, bias))
        strided = weight.t().contiguous().t()
        assert torch.equal(
            products.linear(x[:40], strided, bias), products.times_transposed(x[:40], strided, bias)
        )
    x.requires_grad_()
    assert products.linear(x[:40], weight, bias).requires_grad


@has_panels
def test_compiled_products_refuse_what_does_not_agree():
    x, weight, bias = made(3, 6, 5)
    for wrong in ((x[:, :5], weight, bias), (x, weight, bias[:4])):
        for product in (products.few_rows, products.panels):
            with pytest.raises(ValueError, match="are wanted"):
                product(*wrong, compiled.instructions[0])


def test_strided_inputs_and_a_second_derivative(processor):
    x, weight, _ = made(12, 10, 8)
    wide = torch.zeros(12, 20)
    wide[:, ::2] = x
    torch.testing.assert_close(
        products.linear(wide[:, ::2], weight.t().contiguous().t()), F.linear(x, weight)
    )
    x.requires_grad_()
    y = products.linear(x, weight).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 * torch.ones(12, 10) @ weight.t() @ weight), rtol=1e-4, atol=1e-4)


@has_panels
def test_the_rest_is_left_to_torch(amd, monkeypatch):
    monkeypatch.setattr(compiled, "has_16_bit_products", lambda: True)
    x, weight, bias = made(4, 6, 5)
    x.requires_grad_()

    def name(*arguments):
        return products.linear(*arguments).grad_fn.name()

    assert "_Linear" in name(x, weight, bias)
    assert not products.serves(x.double(), weight.double()) and "_Linear" not in name(
        x.double(), weight.double()
    )
    assert "_Linear" not in name(x, weight.clone().requires_grad_()) and "_Linear" not in name(
        x, weight, bias.clone().requires_grad_()
    )
    assert "_Linear" not in name(x.bfloat16(), weight.bfloat16())
    assert (
        products.linear(x[:0], weight).shape == (0, 5)
        and products.linear(x[:, :0], weight[:, :0], bias).tolist() == [bias.tolist()] * 4
    )
    assert "_Linear" not in name(x, torch.stack([weight, weight], 2)[:, :, 0])


def test_a_caller_compiles_in_one_graph(processor):
    x, weight, bias = made(4, 6, 5)
    x.requires_grad_()
    caller = torch.compile(
        lambda y: products.linear(y, weight, bias).square().sum(), fullgraph=True, backend="aot_eager"
    )
    (own,), (true,) = (
        torch.autograd.grad(caller(x), x),
        torch.autograd.grad(F.linear(x, weight, bias).square().sum(), x),
    )
    torch.testing.assert_close(own, true)


@has_pairs
@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (7, 6, 3), (16, 576, 129), (9, 1536, 49), (70, 2050, 100), (3, 66, 49152)]
)
def test_products_of_bfloat16_keep_float32_sums(shape):
    x, weight, _ = made(*shape, dtype=torch.bfloat16)
    assert products.takes_pairs(x, weight)
    whole, exact = products.in_float32(x, weight), x.double() @ weight.double().t()
    bound = 4 * torch.finfo(torch.float32).eps * shape[1] ** 0.5 * max(1.0, float(exact.abs().max()))
    assert whole.dtype == torch.float32 and (whole - exact).abs().max() <= bound
    # Sums of whole numbers are exact, in whatever order.
    few, ones = (x * 2).round(), weight.sign()
    assert torch.equal(products.in_float32(few, ones).double(), few.double() @ ones.double().t())
    threads, out = torch.get_num_threads(), torch.full_like(whole, torch.nan)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert products.in_float32(x, weight, out) is out and torch.equal(out, whole)
            assert torch.equal(products.in_float32(x[-1:], weight), whole[-1:])
    finally:
        torch.set_num_threads(threads)


@has_pairs
def test_infinite_numbers_and_nan_stay_in_their_rows():
    x, weight, _ = made(3, 64, 50, dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    out, exact = products.in_float32(x, weight), x.double() @ weight.double().t()
    assert out[0].isfinite().all() and out[1].isnan().all()
    assert torch.equal(out[2].double(), exact[2])  # infinite, with the sign of the weight


@has_pairs
def test_what_is_not_multiplied_in_pairs():
    x, weight, _ = made(3, 64, 50, dtype=torch.bfloat16)
    assert not products.takes_pairs(x.float(), weight.float())
    assert not products.takes_pairs(x[:0], weight) and not products.takes_pairs(x, weight[:0])
    assert not products.takes_pairs(x[:, :63], weight[:, :63].contiguous())  # an odd length
    assert not products.takes_pairs(x[:, :50], weight.t()[:50])  # rows that are not dense
    with pytest.raises(ValueError, match="even number"):
        compiled._native.pairs(x[:, :1].contiguous(), weight[:, :1].contiguous(), torch.empty(3, 50), 1)
    with pytest.raises(ValueError, match="shapes do not agree"):
        compiled._native.pairs(x, weight, torch.empty(3, 49), 1)


@pytest.mark.parametrize("shape", [(1, 2, 1), (9, 63, 49), (20, 576, 10000)])
def test_logits_keep_float32_sums_on_every_processor(shape, monkeypatch):
    monkeypatch.setattr(compiled, "multiplies_pairs", False)
    x, weight, _ = made(*shape, dtype=torch.bfloat16)
    out, exact = torch.full((shape[0], shape[2]), torch.nan), x.double() @ weight.double().t()
    bound = 4 * torch.finfo(torch.float32).eps * shape[1] ** 0.5 * max(1.0, float(exact.abs().max()))
    assert products.in_float32(x, weight, out) is out and (out - exact).abs().max() <= bound
    assert torch.equal(products.in_float32(x, weight), out)
    assert products.in_float32(x[None], weight).shape == (1, shape[0], shape[2])
    assert products.in_float32(x[:0], weight).shape == (0, shape[2])


@pytest.mark.parametrize("rows", [1, 9, 70])
def test_a_processor_without_bfloat16_rounds_products_of_float32_once(rows, monkeypatch):
    monkeypatch.setattr(compiled, "has_16_bit_products", lambda: False)
    x, weight, bias = made(rows, 130, 60, dtype=torch.bfloat16)
    leaf, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
    own, exact = products.linear(leaf, weight, bias), F.linear(exact_x, weight.double(), bias.double())
    upstream = torch.randn(own.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    # The graph keeps the matrix as it is.
    assert own.grad_fn.saved_tensors[0].data_ptr() == weight.data_ptr()
    (gradient,) = torch.autograd.grad(own, leaf, upstream)
    (wanted,) = torch.autograd.grad(exact, exact_x, upstream.double())
    for found, true in ((own, exact), (gradient, wanted)):
        assert found.dtype == torch.bfloat16
        # Half of the last place, and what cancels in float32 sums.
        torch.testing.assert_close(found.double(), true.detach(), rtol=2**-8 * (1 + 2**-10), atol=1e-4)
    # What is trained has the bits of what is scored.
    assert torch.equal(products.linear(x, weight, bias), own.detach())


@pytest.mark.parametrize("with_bias", [False, True])
def test_trained_matrices_are_widened_too(with_bias, monkeypatch):
    monkeypatch.setattr(compiled, "has_16_bit_products", lambda: False)
    x, weight, bias = made(20, 130, 60, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    own, exact = products.linear(*leaves), F.linear(*exact_leaves)
    upstream = torch.randn(own.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(own, leaves, upstream)
    wanted = torch.autograd.grad(exact, exact_leaves, upstream.double())
    for a, b in zip((own, *found), (exact, *wanted), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b.detach(), rtol=2**-8 * (1 + 2**-10), atol=1e-4)
    # Other dtypes and processors are torch's alone.
    plain = products.by_torch(F.linear, x.float(), weight.float())
    assert torch.equal(plain, F.linear(x.float(), weight.float()))
    monkeypatch.setattr(compiled, "has_16_bit_products", lambda: True)
    assert torch.equal(products.by_torch(F.linear, x, weight), F.linear(x, weight))
