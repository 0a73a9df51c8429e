"""What a decoding step keeps of the tokens that it has drawn, on a GPU: one kernel, where torch takes 20."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Drawn(NamedTuple):
    """What was drawn for rows that are decoded side by side, as `kernels.sampling.draw.sample_with_gap`
    returns it; [R] each."""

    token: Tensor  # int64
    logprob: Tensor  # float32
    model_logprob: Tensor  # float32
    gap: Tensor  # float32


class Kept(NamedTuple):
    """What is kept of all rows of a batch, with a place for each token; contiguous."""

    tokens: Tensor  # int64 [N, room]
    logprob: Tensor  # float32 [N, room]
    model_logprob: Tensor  # float32 [N, room]
    near_tie: Tensor  # bool [N, room]
    length: Tensor  # int64 [N]
    finished: Tensor  # bool [N]


class State(NamedTuple):
    """Where the rows stand that are decoded side by side; [R] each."""

    row: Tensor  # int64: places among the N
    token: Tensor  # int64: the last token
    fed: Tensor  # bool: whether it is still to be fed
    alive: Tensor  # bool: whether others follow it


@triton.jit
def record_kernel(
    p_token,  # [R] int64
    p_logprob,  # [R] float32
    p_model_logprob,  # [R] float32
    p_gap,  # [R] float32
    p_tokens,  # [N, room] int64
    p_logprobs,  # [N, room] float32
    p_model_logprobs,  # [N, room] float32
    p_near_tie,  # [N, room] uint8
    p_length,  # [N] int64
    p_finished,  # [N] uint8
    p_row,  # [R] int64
    p_last,  # [R] int64
    p_fed,  # [R] uint8
    p_alive,  # [R] uint8
    p_stop,  # [STOPS] int64
    p_step,  # [1] int64
    rows,
    room,
    near,
    STOPS: tl.constexpr,
    FEED_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < rows
    token = tl.load(p_token + o, mask=inside, other=0)
    alive = tl.load(p_alive + o, mask=inside, other=0) != 0
    row = tl.load(p_row + o, mask=inside, other=0)
    ended = tl.zeros([BLOCK], tl.int1)
    for i in range(STOPS):
        ended = ended | (token == tl.load(p_stop + i))
    at = row * room + tl.load(p_step)
    logprob = tl.load(p_logprob + o, mask=inside, other=0.0)
    model_logprob = tl.load(p_model_logprob + o, mask=inside, other=0.0)
    is_near = tl.load(p_gap + o, mask=inside, other=0.0) < near
    tl.store(p_tokens + at, tl.where(alive, token, 0), mask=inside)
    tl.store(p_logprobs + at, tl.where(alive, logprob, 0.0), mask=inside)
    tl.store(p_model_logprobs + at, tl.where(alive, model_logprob, 0.0), mask=inside)
    tl.store(p_near_tie + at, (alive & is_near).to(tl.uint8), mask=inside)
    length = tl.load(p_length + row, mask=inside, other=0)
    tl.store(p_length + row, length + alive.to(tl.int64), mask=inside)
    finished = tl.load(p_finished + row, mask=inside, other=0) != 0
    tl.store(p_finished + row, (finished | (alive & ended)).to(tl.uint8), mask=inside)
    tl.store(p_last + o, token, mask=inside)
    goes_on = alive & (ended == 0)
    if FEED_LAST:
        tl.store(p_fed + o, alive.to(tl.uint8), mask=inside)
    else:
        tl.store(p_fed + o, goes_on.to(tl.uint8), mask=inside)
    tl.store(p_alive + o, goes_on.to(tl.uint8), mask=inside)


def record(
    drawn: Drawn, kept: Kept, state: State, stop: Tensor, step: Tensor, near_tie: float, feed_last: bool
) -> None:
    """Keeps what was drawn at `step` (int64 [1]) and moves the rows on, in place; the host reads nothing.

    A token of `stop` (int64) ends its row. near_tie: gaps below it are noted. feed_last: a row's last token
    is fed too.
    """
    rows, block = len(drawn.token), 128
    with torch.cuda.device_of(drawn.token):
        record_kernel[(triton.cdiv(rows, block),)](
            *drawn,
            *(x.view(torch.uint8) if x.dtype == torch.bool else x for x in (*kept, *state)),
            stop,
            step,
            rows,
            kept.tokens.shape[1],
            near_tie,
            STOPS=len(stop),
            FEED_LAST=feed_last,
            BLOCK=block,
            num_warps=4,
        )
