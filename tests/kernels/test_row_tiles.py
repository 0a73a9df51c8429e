"""How the loss head cuts rows on a GPU, and in which dtype the head's gradient comes."""

import itertools

import pytest
import torch

from kernels.loss_head import schemes
from kernels.loss_head.gradients import Gradients
from kernels.loss_head.records import Head, Needs

pytest.importorskip("triton")

from kernels.loss_head.rows_triton import TritonRows  # noqa: E402


@pytest.mark.parametrize("shape", [(151936, 4096), (128256, 2048), (151936, 896)], ids=str)
@pytest.mark.parametrize("rows", [8192, 8191, 5000, 1000, 100])
@pytest.mark.parametrize("budget", [2**30, 4 * 2**30, 17 * 2**30])
@pytest.mark.parametrize("needs_head", [False, True])
def test_chunks_on_a_gpu_waste_no_tiles_of_rows(shape, rows, budget, needs_head):
    """A matrix product computes whole tiles of 128 rows: all chunks together have hardly more of them than
    the rows in one product."""
    hidden, weight = (torch.empty(n, shape[1], dtype=torch.bfloat16, device="meta") for n in (rows, shape[0]))
    p = schemes.plan(TritonRows, hidden, Head(weight, None, 1.0, None), budget, True, needs_head)

    def tiles(count: int, chunk: int) -> int:
        return sum(-(-min(chunk, count - start) // 128) for start in range(0, count, chunk))

    used = tiles(p.kept, p.rows) + tiles(rows - p.kept, p.rows)
    assert p.kept <= rows and (used <= 1.02 * tiles(rows, rows) or p.rows < TritonRows.TILE)


def test_chunks_of_whole_tiles_are_as_few_as_fit_and_about_equal():
    for rows, most in itertools.product((1, 255, 256, 4000, 8192), (1, 255, 256, 300, 2086, 9000)):
        assert schemes.even(rows, most, 1) == most
        chunk = schemes.even(rows, most, 256)
        if most < 256 or most >= rows:
            assert chunk == most
            continue
        assert chunk % 256 == 0 and 256 <= chunk <= most
        fewest = -(-rows // (most - most % 256))
        assert -(-rows // chunk) <= fewest and fewest * (chunk - 256) < rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("once", [True, False])
def test_a_head_s_gradient_is_kept_in_float32_where_it_is_a_sum(once, dtype):
    weight = torch.empty(33, 8, dtype=dtype)
    head, needs = Head(weight, None, 1.0, None), Needs(True, True, False)
    work = TritonRows(head, TritonRows.sizes(head, 9, 2**20, "kept"), 9, "kept")
    total = Gradients(work, torch.empty(9, 8, dtype=dtype), None, needs, 1.0, once)
    # Float16 has too small a range for sums that are scaled at the end.
    assert total.d_weight.dtype == (dtype if once and dtype != torch.float16 else torch.float32)


def test_a_gpu_gives_the_loss_head_an_eighth_of_its_memory(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert schemes.budget_or_default(None, gpu) == 10 * 2**30
    assert schemes.budget_or_default(5, gpu) == 5
    assert schemes.budget_or_default(None, torch.device("cpu")) == 256 * 2**20
