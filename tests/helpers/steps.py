"""Policy steps without a run: five prompts with scored answers, and a stage that keeps rows alone."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from engine.model import packing
from engine.model.decoder import Decoder
from engine.policy.forward import frozen_forward
from engine.policy.samples import Samples
from engine.records import Prompts, Scores
from engine.rollout.sampler import generate
from engine.run.folder import RunFolder
from tests.helpers.samples import samples_of

PROMPTS = [[1, 70, 75, 80], [1, 90], [1, 66, 67, 68, 69], [1, 71, 72], [1, 85, 86, 87, 88, 89]]


class OneStage:
    """A stage without a run folder: it keeps the rows of steps."""

    name = "iteration-1/policy"
    stopping = wants_to_stop = False

    def __init__(self, folder: Path) -> None:
        self.rows, self.paths = [], RunFolder(folder)

    def progress(self, *words):
        return nullcontext(SimpleNamespace(advance=lambda n: None))

    def partial(self, cls):
        return None

    def log(self, row):
        self.rows.append(row)


def answered(network: Decoder) -> Samples:
    """Samples four responses to each of five prompts, and gives them random scores."""
    prompts = Prompts(
        text=list("abcde"), kind=[""] * 5, token_ids=PROMPTS, key_P=torch.tensor([11, 22, 33, 44, 55])
    )
    rollouts = generate(network, PROMPTS, n=4, max_new_tokens=9, seed=0, stop_token_ids=(2, *range(60, 90)))
    logprob = frozen_forward(network, packing.groups(prompts, rollouts), [], temperature=1.0)[1]
    generator = torch.Generator().manual_seed(0)
    scores = Scores(
        reward_PG=torch.randn(5, 4, generator=generator, dtype=torch.float64),
        utility_PGJ=torch.zeros(5, 4, 1, dtype=torch.float64),
        audit_PGA=torch.zeros(5, 4, 0, dtype=torch.float64),
        ref_logprob_PG=logprob.view(5, 4),
    )
    return samples_of(prompts, rollouts, scores)
