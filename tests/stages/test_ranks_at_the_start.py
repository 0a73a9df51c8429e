"""What is said of ranks that a run cannot use, before it begins."""

from dataclasses import replace

import pytest
import torch

from engine.config import CaidConfig, smoke
from engine.errors import LostRank, UserError
from engine.ranks import Ranks
from engine.stages.alike import check_shares, idle_warnings
from engine.stages.inputs import read_inputs
from tests.helpers.ranks import on_ranks


@pytest.mark.parametrize(
    ("prompts", "ranks", "busy"), [(16, 64, 16), (4, 5, 4), (64, 64, None), (8, 1, None)]
)
def test_a_step_of_fewer_prompts_than_ranks_is_said(prompts, ranks, busy):
    said = idle_warnings(replace(CaidConfig(), prompts_per_step=prompts), Ranks(0, ranks))
    line = f"--prompts-per-step {prompts} keeps {busy} of {ranks} ranks busy in a policy step; raise it, or "
    assert said == ([] if busy is None else [f"{line}start fewer ranks"])


def test_more_ranks_than_prompts_are_refused():
    config = replace(CaidConfig(), n_prompts=8)
    check_shares(config, Ranks(0, 8))
    with pytest.raises(
        UserError, match="^9 ranks share out 8 training prompts, .* start at most 8 ranks, or"
    ):
        check_shares(config, Ranks(0, 9))


def test_fewer_gpus_than_ranks_of_a_machine_are_refused_by_one_rank_of_it():
    config = replace(smoke(CaidConfig()), device="cuda")

    def read(ranks: Ranks) -> None:
        torch.cuda.is_available, torch.cuda.device_count = (
            lambda: True,
            lambda: 1,
        )  # in the rank's own process
        with ranks.node_first():
            read_inputs(config, ranks=ranks)

    first, other = on_ranks(2, read)
    assert isinstance(first, UserError) and isinstance(other, LostRank)
    assert str(first) == (
        "2 ranks on a machine with 1 visible CUDA devices: start --nproc-per-node 1, or use --device cpu."
    )
