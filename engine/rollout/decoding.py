"""Decodes rows side by side: draws a token for each, feeds it to the model, drops rows that have ended."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.low_rank import LowRank
from engine.rollout.cache import AnyCache, GpuCache
from engine.rollout.states import Collector
from kernels.sampling.draw import sample_with_gap

# The batch is compacted when at most this share of its rows still runs. On a GPU that costs a new CUDA
# graph, hence the lower share.
COMPACT_AT, COMPACT_AT_ON_GPU = 0.85, 0.5
# Two best perturbed logits this close may change places with the shape of a batch,
# which decides how sums are rounded.
NEAR_TIE = 1e-4
# A GPU takes this many steps between two looks of the host.
STEPS_UNSEEN = 8


class Drawing(NamedTuple):
    """How tokens are drawn."""

    temperature: float
    top_p: float
    top_k: int
    stop: Tensor  # int64: the tokens that end a row, on the model's device
    min_new_tokens: int  # no stop token is drawn among the first of these


class Rows:
    """The rows of a batch that are decoded side by side, and the tokens drawn for all rows of the batch.

    All tensors lie on the model's device and change in place. `draw` and `feed` never wait for it, so that a
    CUDA graph can hold them.
    """

    def __init__(
        self,
        model: Decoder,
        cache: AnyCache,
        hidden: Tensor,
        key: Tensor,
        drawing: Drawing,
        room: int,
        *,
        adapter: LowRank | None = None,
        collector: Collector | None = None,
    ) -> None:
        """Starts at the prompts' ends.

        hidden: states [R, D] of the last token of each row's prompt. key: int64 [R], keys the random numbers.
        """
        rows, device = len(hidden), hidden.device
        self.model, self.cache, self.adapter, self.collector, self.drawing = (
            model,
            cache,
            adapter,
            collector,
            drawing,
        )
        self.tokens = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self.logprob, self.model_logprob = (torch.zeros(rows, room, device=device) for _ in range(2))
        self.near_tie = torch.zeros(rows, room, dtype=torch.bool, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # tokens of each row that have been fed
        # The rest is about the rows side by side. `row` is a row's place in the batch, `token` its last
        # token, `fed` whether that is still to be fed, and `alive` whether others follow it.
        self.row, self.token = torch.arange(rows, device=device), torch.zeros_like(self.length)
        self.fed, self.alive = torch.ones_like(self.finished), torch.ones_like(self.finished)
        self.hidden, self.key = hidden, key.to(device)

    def draw(self) -> None:
        """Draws the next token of each row, from the states of its last one."""
        how = self.drawing
        sample = partial(sample_with_gap, temperature=how.temperature, top_p=how.top_p, top_k=how.top_k)
        logits = self.model.logits(self.hidden)
        if how.min_new_tokens and len(how.stop):
            without_stop = logits.index_fill(1, how.stop, -torch.inf)
            allowed = torch.where(self.step < how.min_new_tokens, without_stop, logits)
            token, logprob, _, gap = sample(allowed, key=self.key, step=self.step)
            log_softmax = (logits.float() / (how.temperature or 1)).log_softmax(1)
            model_logprob = log_softmax.gather(1, token[:, None])[:, 0]
        else:
            token, logprob, model_logprob, gap = sample(logits, key=self.key, step=self.step)
        # A row's last token is fed too where its states are wanted.
        feed_last = self.collector is not None
        if token.is_cuda:
            from kernels.sampling import record_triton as on_gpu

            drawn = on_gpu.Drawn(token, logprob, model_logprob, gap)
            kept = on_gpu.Kept(
                self.tokens, self.logprob, self.model_logprob, self.near_tie, self.length, self.finished
            )
            state = on_gpu.State(self.row, self.token, self.fed, self.alive)
            on_gpu.record(drawn, kept, state, how.stop, self.step, NEAR_TIE, feed_last)
            return
        ended = (token[:, None] == how.stop).any(dim=1)
        for kept, drawn in (
            (self.tokens, token),
            (self.logprob, logprob),
            (self.model_logprob, model_logprob),
        ):
            kept[self.row, self.step] = torch.where(self.alive, drawn, 0)
        self.near_tie[self.row, self.step] = self.alive & (gap < NEAR_TIE)
        self.length[self.row] += self.alive
        self.finished[self.row] |= self.alive & ended
        self.token.copy_(token)
        self.fed.copy_(self.alive if feed_last else self.alive & ~ended)
        self.alive &= ~ended

    def feed(self, stop: int | None = None) -> None:
        """Computes the states of the tokens just drawn; with `stop` only below that layer."""
        tap = None if self.collector is None else partial(self.collector.take, self.row, self.step, self.fed)
        hidden = self.model(self.token, self.cache, adapter=self.adapter, tap=tap, stop=stop)
        if stop is None:
            self.hidden.copy_(hidden)
        self.cache.advance()
        self.step += 1

    def compact(self) -> None:
        """Drops the rows that need not be fed."""
        keep = self.fed.nonzero()[:, 0]
        self.cache.keep(keep)
        for name in ("row", "token", "fed", "alive", "hidden", "key"):
            setattr(self, name, getattr(self, name)[keep])


def decode(rows: Rows, room: int, on_step: Callable[[int], None] | None) -> None:
    """Draws up to `room` tokens of each row; the tokens drawn last are not fed."""
    reported, graph, on_gpu = 0, None, isinstance(rows.cache, GpuCache)
    rows.draw()
    for step in range(1, room):
        if not on_gpu or step % STEPS_UNSEEN == 0:
            # The host waits for a GPU once.
            drawn, alive, fed = torch.stack((rows.length.sum(), rows.alive.sum(), rows.fed.sum())).tolist()
            if on_step is not None:
                on_step(drawn - reported)
                reported = drawn
            if not alive:
                return
            if fed <= (COMPACT_AT_ON_GPU if on_gpu else COMPACT_AT) * len(rows.fed):
                rows.compact()
                graph = None
        if graph is not None:
            graph.replay()
            continue
        rows.feed()
        rows.draw()
        # A graph pays only where some steps are left to replay.
        if rows.hidden.is_cuda and on_gpu and room - step > STEPS_UNSEEN:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, computes nothing
                rows.feed()
                rows.draw()
    if on_step is not None:
        on_step(int(rows.length.sum()) - reported)
