"""The tests of Triton kernels that need its interpreter, all in one process, which takes seconds to start."""

from pathlib import Path

from tests.helpers.interpreter import compiled, run_interpreted

NAMES = ("decode", "draw_triton", "gather", "layer_triton", "rows_sparse_triton", "rows_triton")
FILES = [Path(__file__).with_name(f"test_{name}.py") for name in NAMES]


@compiled
def test_interpreted_tests_pass():
    run_interpreted(*FILES)
