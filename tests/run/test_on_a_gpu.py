"""What a run sets for a GPU: repeatable products, sums in float32, and rows side by side."""

import os
from types import SimpleNamespace

import pytest
import torch

from engine.config import CaidConfig
from engine.run import machine
from engine.stages import job
from engine.stages.inputs import prepare_process

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_products_are_repeatable_and_add_in_float32(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True
    threads = torch.get_num_threads()
    prepare_process(threads)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own
    prepare_process(threads)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("before", [False, True])
def test_a_backward_pass_is_repeatable_on_a_gpu_alone(before):
    found = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before)
    try:
        with machine.repeatable(CPU):
            assert torch.are_deterministic_algorithms_enabled() == before
        with pytest.raises(ZeroDivisionError), machine.repeatable(GPU):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(found)


@pytest.mark.parametrize(
    "device, given, resumes, planned, fewer",
    [
        (CPU, 384, False, 384, True),
        (GPU, 384, False, 1024, True),
        (GPU, 100, False, 100, False),
        (GPU, 700, True, 700, True),
        (GPU, 384, True, 384, True),
    ],
)
def test_a_gpu_decodes_more_rows_where_the_user_says_nothing(
    device, given, resumes, planned, fewer, monkeypatch
):
    asked = []

    def plan(config, *shapes, fewer_rows, **options):
        asked.append((config.rollout_rows, fewer_rows))
        return SimpleNamespace(check=lambda: None, rows=config.rollout_rows)

    monkeypatch.setattr(job.Plan, "of", plan)
    monkeypatch.setattr(job, "sizes", lambda *config, **options: [])
    inputs = SimpleNamespace(shape=None, dtype=None, device=device, folder=None, fingerprint=None)
    prompts = SimpleNamespace(token_ids=[[1]])
    config = CaidConfig(rollout_rows=given)
    found = job._plan(config, inputs, prompts, prompts, (), job.ALONE, resumes=resumes)
    assert asked == [(planned, fewer)] and found.rows == planned
