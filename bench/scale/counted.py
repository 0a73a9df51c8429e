"""Counts what ranks send one another in the parts of a run, on a tiny model and on processors, and holds it
against the least that must go between them.

The samples go between the ranks, and then again in the result of their stage, which rank 0 has read back from
its file for all: so a run and one that was resumed go on from the same bits. The least of both are their
tensors and texts; the prompts that go along are known everywhere. In the same way the weights and moments of
an adapter go to all at the end of an update; of spread weights each rank keeps its rows.
"""

import math
import os
import pickle
import signal
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from bench.scale.parts import Message, run_in_parts
from engine.config import CaidConfig, smoke
from engine.policy.samples import Samples
from engine.ranks import Ranks
from engine.run.spread import pieces

# So many prompts and responses, with so many tokens, make messages that are large beside what frames them.
PROMPTS, RESPONSES, TOKENS, STEPS, RANK = 15, 10, 32, 3, 64
# Numbers in float64 that go along with a step's gradients: loss, accuracy, margin, two of entries
# that the loss head leaves out, a wish to stop.
FIGURES = 6
# Bytes of a token that a response may have: its id, two log-probs and a flag. Of a response: its length, its
# end, and in float64 its reward, a cost, an audit, its log-prob under the reference and its log-ratio.
TOKEN_BYTES, RESPONSE_BYTES = 8 + 4 + 4 + 1, 8 + 1 + 5 * 8
OVER = 1.02  # so many times the least may go between the ranks, besides padding and words
# Words and digests, which do not grow with the sizes of what is sent: of a stage, and of shards.
WORDS_BYTES, SHARDS_BYTES = 4096, 128 * 1024
PATIENCE_S = 240  # a process that waits for another one is ended then


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What went between the ranks in a part of a run."""

    name: str
    messages: list[Message]
    least: int  # bytes
    padding: int = 0  # bytes that make the parts of a gather equally long
    words: int = 0  # bytes that may go besides, which do not grow

    @property
    def bytes(self) -> int:
        """Returns the bytes of all messages."""
        return sum(message.bytes for message in self.messages)

    @property
    def most(self) -> int:
        """Returns the bytes that may go between the ranks."""
        return int(OVER * self.least) + self.padding + self.words


def count(ranks: Ranks, tune: str, folder: Path) -> list[Counted]:
    """Counts a run of the preset smoke with one iterate; all ranks call it. folder: for the run, and for
    nothing else."""
    config = replace(
        smoke(CaidConfig()),
        n_prompts=PROMPTS,
        n_responses=RESPONSES,
        max_new_tokens=TOKENS,
        prompts_per_step=8,
        iterations=1,
        steps=STEPS,
        weight_average=0.0,
        checkpoint_every=STEPS,
        lora_rank=RANK,
        tune=tune,
        learning_rate=1e-3,
        max_kl_ratio=math.inf,
        threads=1,
        out=str(folder / "run"),
    )
    (reference, dual, update, _), stages = run_in_parts(config, ranks)
    weights, shape = list(stages.updates.weights.parameters()), stages.job.model.config
    trained, item = sum(value.numel() for value in weights), stages.job.model.dtype.itemsize
    samples, padding = _samples_bytes(stages.reference.samples, ranks.size)
    prompts = 2 * len(pickle.dumps(stages.reference.prompts))
    # The end of the last step: after it only the iterate is saved.
    end = 1 + max(i for i, message in enumerate(update.messages) if "reduce" in message.op)
    if tune == "full":
        gathered, outer = item * trained, item * pieces(shape, 1)[1]
        # Sampling, scoring, and measuring how far the two are apart each gather the weights once. A pass
        # gathers each layer twice and the rest once, and sums gradients in float32.
        samples_least, saved = 2 * samples + 3 * gathered, gathered
        step = 2 * gathered - outer + 4 * trained + 8 * FIGURES
    else:
        samples_least, saved, step = 2 * samples, 3 * 4 * trained, 4 * trained + 8 * FIGURES
    return [
        Counted(
            name="reference",
            messages=reference.messages,
            least=samples_least,
            padding=padding,
            words=prompts,
        ),
        Counted(name="dual", messages=dual.messages, least=0, words=WORDS_BYTES),
        Counted(name=f"{STEPS} policy steps", messages=update.messages[:end], least=STEPS * step),
        Counted(
            name="iterate",
            messages=update.messages[end:],
            least=saved,
            words=SHARDS_BYTES if tune == "full" else WORDS_BYTES,
        ),
    ]


def _samples_bytes(samples: Samples, size: int) -> tuple[int, int]:
    """Returns the bytes of samples, and those that make the ranks' shares of them equally long."""
    shares = [Ranks(rank, size).share(PROMPTS) for rank in range(size)]
    sizes = []
    for share in shares:
        rows = range(share.start * RESPONSES, share.stop * RESPONSES)
        texts = sum(len(samples.texts[row].encode()) for row in rows)
        sizes.append(len(rows) * (TOKENS * TOKEN_BYTES + RESPONSE_BYTES) + texts)
    return sum(sizes), max(sizes) * size - sum(sizes)


def count_on(size: int, tune: str) -> list[Counted]:
    """Counts on so many processes of this machine, which talk by gloo."""
    import_before_forks()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_count_here, (size, tune, folder), nprocs=size, start_method="fork")
        return pickle.loads((Path(folder) / "counted").read_bytes())


def import_before_forks() -> None:
    """Imports what each process would import for itself."""
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401


def _count_here(rank: int, size: int, tune: str, folder: str) -> None:
    signal.alarm(PATIENCE_S)
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    ranks = Ranks.join(store, rank, size, rank, size)
    counted = count(ranks, tune, Path(folder))
    if ranks.is_first:
        (Path(folder) / "counted").write_bytes(pickle.dumps(counted))
    ranks.leave()
