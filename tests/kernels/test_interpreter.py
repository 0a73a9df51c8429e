"""The tests of Triton kernels that need its interpreter, in two processes, as each takes seconds to start."""

from pathlib import Path

import pytest

from tests.helpers.interpreter import compiled, run_interpreted

TOGETHER = ("decode", "draw_triton", "gather", "layer_triton", "rows_triton"), ("rows_sparse_triton",)


@compiled
@pytest.mark.parametrize("names", TOGETHER, ids=["most", "lists"])
def test_interpreted_tests_pass(names):
    run_interpreted(*(Path(__file__).with_name(f"test_{name}.py") for name in names))
