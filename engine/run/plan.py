"""The time and memory that a run is predicted to need, printed before it starts.

Where memory is short, fewer responses are decoded side by side; where it does not suffice even
then, the run stops there. On several ranks the prediction is for one of them, that with the largest share of
the prompts and the least free memory. Messages between ranks are not in the time: `bench.scale` counts them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from engine.config import RunConfig
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.slices import sliced, slices_of
from engine.ranks import ALONE, Ranks
from engine.run.machine import available_memory, check_equal_devices, device_name, matmul_rate
from engine.run.needs import (
    EFFICIENCY,
    FLAT_BYTES,
    ScorerSize,
    adapter_bytes,
    adapter_parameters,
    gathered_bytes,
    kept_bytes,
    kept_states_bytes,
    largest_share,
    products,
    sampled_sets,
    samples_bytes,
    sampling_bytes,
    scorer_bytes,
    scorer_products,
    scoring_bytes,
    states_bytes,
    training_bytes,
)
from engine.run.spread import shard_size, spread_bytes, step_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a plan is made from: a run's settings, its model, and the lengths in tokens of the prompts that
    will be sampled."""

    config: RunConfig
    shape: ModelConfig
    dtype: torch.dtype
    device: torch.device
    train: list[int]
    heldout: list[int]
    scorers: Sequence[ScorerSize] = ()  # models beside the policy's
    model_ranks: int = 1  # that hold one model together, each a slice of it

    def needed(self, rows: int, ranks: int = 1, shards: int = 1) -> int:
        """Counts the bytes that a rank needs at the peak, with `rows` responses side by side.

        ranks: share out the prompts. shards: ranks that weights are spread over; 1: they stand whole on each.
        """
        config, dtype, device = self.config, self.dtype, self.device
        shape, shares = sliced(self.shape, self.model_ranks), ranks // self.model_ranks
        longest = max(self.train + self.heldout)
        weights = shape.parameter_count() * dtype.itemsize
        training = training_bytes(config, shape, dtype, device, longest, shares)
        results, sets = samples_bytes(config), sampled_sets(config, shares)
        beside, scoring = scorer_bytes(config, device, self.scorers)
        scoring = max(scoring, scoring_bytes(config, shape, dtype, device, longest, sets))
        sampling = sampling_bytes(config, shape, dtype, device, self.train + self.heldout, rows, sets)
        if shards > 1:
            # What samples and scores has all weights in 16 bits, first the policy's and then the reference's.
            sampling, scoring = (weights + working for working in (sampling, scoring))
            training += step_bytes(shape, dtype)
            on_cpu, averaged = device.type == "cpu", config.weight_average > 0
            weights = spread_bytes(shape, dtype, shards, on_cpu=on_cpu, averaged=averaged)
        elif ranks == 1:
            results += kept_bytes(config, shape, dtype, device, self.train)
        else:
            # States below the adapter are kept while the responses of a share are scored, and no longer.
            share = sorted(self.train)[-largest_share(len(self.train), shares) :]
            sampling, scoring = (
                working + states_bytes(config, shape, dtype, share) for working in (sampling, scoring)
            )
            training += adapter_bytes(config, self.shape)
            training += FLAT_BYTES * adapter_parameters(config, self.shape)
        if ranks > 1:
            results += gathered_bytes(config)
        return _peak(weights + beside + results + max(sampling, training, scoring))

    def rows(self, available: int, ranks: int = 1, shards: int = 1) -> int:
        """Lowers config.rollout_rows to what fits into `available` bytes, down to one prompt's responses."""
        least = max(self.config.n_responses, self.config.eval_responses)
        needed = partial(self.needed, ranks=ranks, shards=shards)
        return rows_that_fit(self.config.rollout_rows, least, needed, available)

    def seconds(self, rate: float, ranks: int = 1) -> float:
        """Predicts the time of the rank with most prompts, where all multiply at `rate` in bare products."""
        config, lengths = self.config, self.train + self.heldout
        mean = sum(lengths) / len(lengths)
        shape, shares = sliced(self.shape, self.model_ranks), ranks // self.model_ranks
        # A file of pairs has not been sampled.
        keeps = ranks == 1 and not config.pairs_file
        keeps = keeps and states_bytes(config, shape, self.dtype, self.train) > 0
        total = products(config, shape, self.dtype, mean, shares, keeps=keeps)
        total += scorer_products(config, self.scorers, mean, ranks)
        return 2 * total / (EFFICIENCY[self.dtype.itemsize] * rate)


@dataclass(frozen=True)
class Plan:
    """The prediction for a run, of each of its ranks."""

    needed_bytes: int  # at the peak
    available_bytes: int  # on the rank that has least
    seconds: float
    rows: int  # responses to decode side by side
    spare: str = ""  # what else spares memory
    ranks: int = 1
    tightest: int = 0  # the rank that has least memory
    shards: int = 1  # ranks that each weight is spread over; 1: it stands whole on each
    cure: str = ""  # what would fit, where this does not on several ranks

    @staticmethod
    def of(
        config: RunConfig,
        shape: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        train: list[int],
        heldout: list[int],
        *,
        scorers: Sequence[ScorerSize] = (),
        fewer_rows: bool = False,
        ranks: Ranks = ALONE,
    ) -> "Plan":
        """Counts the bytes and the products of a run, and times a matrix product for the rate.

        train, heldout: lengths in tokens of the prompts that will be sampled. scorers: models beside the
        policy's. fewer_rows: `rows` may be lowered to those that fit, down to the responses of one prompt.
        ranks: share out the work, and those of one machine its main memory; all of them get the same plan, by
        the least memory and the lowest rate of any.

        Raises: UserError naming a rank whose device is not that of rank 0.
        """
        work = Work(
            config=config,
            shape=shape,
            dtype=dtype,
            device=device,
            train=train,
            heldout=heldout,
            scorers=scorers,
            model_ranks=ranks.model_size,
        )
        own = available_memory(device)
        if device.type == "cpu":
            own //= ranks.local_size
        name = device_name(device) if ranks.size > 1 else ""
        found = ranks.gather((own, matmul_rate(dtype, device), name, ranks.local_size))
        check_equal_devices([name for *_, name, _ in found])
        available, tightest = min((free, rank) for rank, (free, *_) in enumerate(found))
        # Where machines have unlike numbers of ranks, weights are spread over all ranks.
        local = ranks.local_size if len({local for *_, local in found}) == 1 else 1
        for shards in shards_to_try(config, ranks.size, local):
            rows = work.rows(available, ranks.size, shards) if fewer_rows else config.rollout_rows
            needed = work.needed(rows, ranks.size, shards)
            if needed <= available:
                break
        short = ranks.size > 1 and needed > available
        aside = device.type == "cuda" and scorer_bytes(config, device, scorers)[0] > 0
        return Plan(
            needed_bytes=needed,
            available_bytes=available,
            seconds=work.seconds(min(rate for _, rate, *_ in found), ranks.size),
            rows=rows,
            spare="--offload-scorers or " if aside else "",
            ranks=ranks.size,
            tightest=tightest,
            shards=shards,
            cure=what_fits(work, available, rows, ranks.size, local) if short else "",
        )

    def check(self) -> None:
        """Stops a run that does not fit. Raises: UserError when less memory is free than is needed."""
        if self.needed_bytes <= self.available_bytes:
            return
        needed, free = (f"{n / 1e9:.1f} GB" for n in (self.needed_bytes, self.available_bytes))
        if self.ranks > 1:
            raise UserError(
                f"this run needs about {needed} of memory on each of its {self.ranks} ranks and {free} are "
                f"free on rank {self.tightest}; {self.cure}."
            )
        raise UserError(
            f"this run needs about {needed} of memory and {free} are free; lower --rollout-rows (here "
            f"{self.rows}), --prompts-per-step, --n-responses, --eval-responses, --max-new-tokens or "
            f"--lora-rank, or use {self.spare}--dtype bfloat16."
        )

    def sentence(self) -> str:
        """Says the prediction in one line for the user."""
        each = f"on each of {self.ranks} ranks " if self.ranks > 1 else ""
        return (
            f"predicted: about {max(1, round(self.seconds / 60))} min, {self.needed_bytes / 1e9:.1f} GB of "
            f"memory {each}({self.available_bytes / 1e9:.1f} GB free)"
        )


def shards_to_try(config: RunConfig, ranks: int, local: int) -> list[int]:
    """Lists the numbers of ranks that weights may be spread over, the best first: the `local` ranks of one
    machine, whose messages are fast, or all. With an adapter the model stands whole on each rank."""
    if config.tune != "full":
        return [1]
    return [local, ranks] if 1 < local < ranks and ranks % local == 0 else [ranks]


def what_fits(work: Work, available: int, rows: int, ranks: int, local: int) -> str:
    """Says what would fit where a run of several ranks, `local` of them on a machine, does not fit into
    `available` bytes each with `rows` responses side by side."""
    config, least = work.config, max(work.config.n_responses, work.config.eval_responses)

    def fits(work: Work = work, ranks: int = ranks, available: int = available) -> bool:
        return work.needed(least, ranks, shards_to_try(work.config, ranks, ranks)[0]) <= available

    def changed(**settings) -> Work:
        return replace(work, config=replace(config, **settings))

    if fits():
        fewer = work.rows(available, ranks, shards_to_try(config, ranks, ranks)[0])
        return f"with --rollout-rows {fewer} it would fit"
    more = [ranks * times for times in (2, 4, 8, 16) if ranks * times <= config.n_prompts]
    found = [f"{n} ranks with as much memory" for n in more if fits(ranks=n)][:1]
    if work.device.type == "cpu":  # the ranks of a machine share its memory
        fewer = [n for n in range(local - 1, 0, -1) if local % n == n % work.model_ranks == 0]
        found += [
            f"{n} of {local} ranks on a machine"
            for n in fewer
            if fits(ranks=ranks // local * n, available=available * local // n)
        ][:1]
    cuts = [n for n in slices_of(work.shape) if config.tune == "lora" and local % n == 0]
    found += [f"--model-ranks {n}" for n in cuts if fits(replace(work, model_ranks=n))][:1]
    shorter = [config.tokens_per_forward // 2**i for i in range(1, 7)]
    found += [f"--tokens-per-forward {n}" for n in shorter if fits(changed(tokens_per_forward=n))][:1]
    if not config.activation_checkpointing and fits(changed(activation_checkpointing=True)):
        found.append("--activation-checkpointing")
    if work.device.type == "cuda" and not config.offload_scorers and fits(changed(offload_scorers=True)):
        found.append("--offload-scorers")
    if config.tune == "full" and fits(changed(tune="lora")):
        found.append("--tune lora")
    if work.dtype == torch.float32 and fits(replace(work, dtype=torch.bfloat16)):
        found.append("--dtype bfloat16")
    if found:
        beside = f" (beside --rollout-rows {least})" if rows > least else ""
        return f"what would fit: {', or '.join(found)}, or a smaller model{beside}"
    whole = sliced(work.shape, work.model_ranks).parameter_count() * work.dtype.itemsize
    if 2 * whole > available:
        return (
            f"its weights alone take {whole / 1e9:.1f} GB, which each rank holds while it samples: use a "
            "smaller model, or ranks with more memory"
        )
    return (
        "use a smaller model, or ranks with more memory, or lower --prompts-per-step, --tokens-per-forward, "
        "--n-responses, --eval-responses, --max-new-tokens and --lora-rank"
    )


def _peak(counted: float) -> int:
    """Adds to the bytes that are counted those that are not, and the libraries."""
    return int(1.15 * counted) + 600 * 2**20


def rows_that_fit(rows: int, n: int, needed: Callable[[int], int], available: int) -> int:
    """Lowers `rows` by whole prompts of n responses until needed(rows) <= available
    bytes, down to one prompt."""
    if rows <= n or needed(rows) <= available:
        return rows
    fewer, most = 1, -(-(rows - n) // n)  # prompts to leave out: the fewest that do, or all but one
    while fewer < most:
        middle = (fewer + most) // 2
        if needed(max(n, rows - middle * n)) <= available:
            most = middle
        else:
            fewer = middle + 1
    return max(n, rows - fewer * n)


def evaluation_rows(
    config: RunConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    heldout: list[int],
    n_prompts: int,
    scorers: Sequence[ScorerSize] = (),
    ranks: Ranks = ALONE,
) -> int:
    """Returns how many responses `engine.evaluate` decodes side by side, on this rank:
    config.rollout_rows, or as many as fit.

    heldout: lengths in tokens of all prompts; n_prompts: the most that are scored at once. scorers: models
    beside the policy's.
    Raises: UserError where there is no room for one prompt's responses.
    """
    shape = sliced(shape, ranks.model_size)
    n, longest, weights = config.eval_responses, max(heldout), shape.parameter_count() * dtype.itemsize
    if config.tune == "full" and ranks.size > 1:
        # Rows of the reference and of the iterate, and all weights of one of them while it computes.
        weights += shard_size(shape, ranks.size) * (dtype.itemsize + max(4, dtype.itemsize))
    elif config.tune == "full":
        weights += shape.parameter_count() * (dtype.itemsize + max(4, dtype.itemsize))
    kept = 0  # of states below an adapter
    if config.tune != "full":
        kept = kept_states_bytes([longest] * n_prompts, n * config.max_new_tokens, shape.hidden_size, dtype)
    beside, scoring = scorer_bytes(config, device, scorers)
    sets = [(n_prompts, n)]
    scoring = max(scoring, scoring_bytes(config, shape, dtype, device, longest, sets))

    def needed(rows: int) -> int:
        sampling = sampling_bytes(config, shape, dtype, device, heldout, rows, sets)
        return _peak(weights + beside + kept + max(sampling, scoring))

    available = available_memory(device)
    if device.type == "cpu":
        available //= ranks.local_size
    rows = rows_that_fit(config.rollout_rows, n, needed, available)
    if needed(rows) > available:
        raise UserError(
            f"this evaluation needs about {needed(rows) / 1e9:.1f} GB of memory and {available / 1e9:.1f} "
            "GB are free; lower --n-prompts or --n-responses, or give shorter --prompts."
        )
    return rows
