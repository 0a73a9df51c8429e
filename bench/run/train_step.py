"""One optimizer step of DPO against its floor and TRL's DPOTrainer on the same tokens:
LoRA on every linear, or all weights.

The floor is the bare matrix products: all layers on the packed tokens (each prompt once), forward, for the
gradient of the states and, where all weights are trained, for that of the weights, and the same of the head
on the completion tokens. It leaves out the adapter's products.

Ours is a step of `engine.policy.fit` with an optimizer that stays. It has the reference's log-probs already,
as they come with the samples. TRL runs once as it does by default, with a forward pass of the reference in
every step, and once with log-probs precomputed.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.run import floors, shapes
from bench.run.candidates import add_rivals, timed
from bench.run.options import Device, KeepPages, Model, Repeats, Save, Shape
from bench.run.origin import origin
from bench.run.products import Ways, bare_products, layer_matrices, weight_gradients
from bench.run.tables import (
    Table,
    candidate_table,
    engine_title,
    floor_shares,
    ratio_and_memory,
    times,
    token_rate,
)
from engine.config import DpoConfig
from engine.model import packing
from engine.model.decoder import Decoder
from engine.policy.forward import frozen_forward
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter
from engine.policy.pairs import within_prompts
from engine.policy.preference_loss import PreferenceLoss, parts, share_of
from engine.policy.samples import Samples
from engine.policy.update import add_gradient
from engine.records import Prompts, Rollouts, Score, ScoredTarget, Scores, Units
from engine.run.machine import keep_freed_memory

RANK, BETA, RATE = 8, 0.1, 1e-4
CONFIG = DpoConfig(labels="soft", temperature=1.0)
# The expected Bradley-Terry labels of scores so far apart are 1 and 0: those of the responses
# called chosen and rejected.
CHOSEN, REJECTED = 100.0, 0.0
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step of DPO with LoRA on every linear, or on all weights, against its
    floors and TRL's DPOTrainer."""

    model: Model = ""
    shape: Shape = ""
    tune: str = "lora"
    """lora or full."""
    pairs: int = 8
    """Pairs of responses in the batch."""
    prompt: int = 64
    """Tokens of each prompt."""
    response: int = 64
    """Tokens of each response."""
    dtype: str = "float32"
    """float32 or bfloat16; trained weights are float32 in any case."""
    device: Device = "cpu"
    rivals: bool = True
    """TRL too, not the floors alone."""
    keep_pages: KeepPages = True
    repeats: Repeats = 7
    save: Save = True


def run(config: TrainStep) -> dict:
    """Measures; returns the line of results.jsonl."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.tune not in ("lora", "full"):
        raise SystemExit(f"--tune {config.tune}: must be lora or full.")
    full = config.tune == "full"
    if config.keep_pages:
        keep_freed_memory()
    # Only TRL reads a random model from its folder.
    opened = shapes.opened(config.model, config.shape, dtype, device, saved=config.rivals)
    with opened as (name, folder, model):
        groups = batch(model.config.vocab_size, config.pairs, config.prompt, config.response)
        reference = reference_logprob(model, groups)
        steps, makers = {"dualign": ours(model, groups, reference, full=full)}, {}
        if config.rivals and find_spec("trl"):
            options = {"full": full, "dtype": dtype, "device": device}
            makers["TRL DPOTrainer"] = lambda: trl(folder, groups, None, **options)
            makers["TRL DPOTrainer, reference precomputed"] = lambda: trl(
                folder, groups, reference, **options
            )
        losses = {"dualign": steps["dualign"]()}
        answers, not_run = add_rivals(steps, makers)
        for candidate, loss in (losses | answers).items():
            # The policy is the reference at first; 16 bits round log-probs that are summed over a response.
            if not abs(loss - math.log(2)) < (1e-4 if dtype == torch.float32 else 5e-2):
                raise SystemExit(
                    f"{candidate}: the loss of the first step is {loss}, not ln 2; nothing is timed"
                )
        parts = floors.training(model.config, dtype.itemsize, *sizes(groups), full=full)
        products = floor(model, groups, full=full)
        measured = timed(steps, products, config.repeats, device, parts=parts, dtype=dtype)
    tokens = 2 * config.pairs * (config.prompt + config.response)
    for row in measured["candidates"]:
        row["tokens_per_s"] = tokens / row["median_s"]
        row["rate_share"] = measured["flops"] / row["median_s"] / measured["flops_per_s"]
    return {
        "case": "train_step",
        "shape": name,
        "rows": 2 * config.pairs,
        "prompt": config.prompt,
        "new": config.response,
        "full": full,
        "dtype": config.dtype,
        "keep_pages": config.keep_pages,
        "tokens": tokens,
        **measured,
        "not_run": not_run,
        **origin(device),
    }


def table(line: dict) -> Table:
    """Returns the table of a line; old lines lack the rate of products."""
    columns = times() | floor_shares(line)
    if "flops_per_s" in line:
        columns["of the rate of products"] = lambda c: f"{100 * c['rate_share']:.1f} %"
    columns |= ratio_and_memory(line) | token_rate(line)
    return candidate_table(line, engine_title(line), columns)


def batch(vocabulary: int, pairs: int, prompt: int, response: int) -> list[packing.Group]:
    """Makes pairs of random responses to random prompts."""
    g = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary // 2, (count,), generator=g).tolist()

    return [
        packing.Group(draw(prompt), [draw(response), draw(response)], [2 * k, 2 * k + 1])
        for k in range(pairs)
    ]


@torch.no_grad()
def reference_logprob(model: Decoder, groups: list[packing.Group]) -> Tensor:
    """Returns the log-probs of all responses under the reference, chosen and rejected
    ones in turn: float64 [2 K]."""
    _, logprob = frozen_forward(
        model,
        groups,
        [],
        temperature=CONFIG.temperature,
        memory_budget_bytes=CONFIG.memory_budget_bytes,
    )
    return logprob


def ours(
    model: Decoder, groups: list[packing.Group], reference: Tensor, *, full: bool = False
) -> Callable[[], float]:
    """Returns a step on an adapter of all layers, or on all weights: forward, loss, backward, clipping and
    AdamW. It returns the loss."""
    if full:
        weights = FullWeights(model)
    else:
        weights = Adapter.on(model, rank=RANK, alpha=2 * RANK, share=0.0, seed=0)
    samples, target = _samples(groups, reference)
    pairs = within_prompts(target.score_PG, list(range(len(groups))), 2)

    loss_of = PreferenceLoss(config=CONFIG, model=model, weights=weights, samples=samples, target=target)

    def add_gradients() -> float:
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for part, first in parts(pairs, groups, CONFIG.tokens_per_forward):
            total += add_gradient(loss_of(part, 0, first).loss, share_of(CONFIG.labels, part, pairs))
        return float(total)

    return stepper(list(weights.parameters()), add_gradients, full)


def _samples(groups: list[packing.Group], reference: Tensor) -> tuple[Samples, ScoredTarget]:
    """Returns the groups as scored samples of a run, and a target in which the first
    response of each pair is chosen."""
    count, lengths = len(groups), torch.tensor([len(r) for g in groups for r in g.responses])
    longest = int(lengths.max())
    tokens = torch.tensor([r + [0] * (longest - len(r)) for g in groups for r in g.responses])
    score_PG = torch.tensor([[CHOSEN, REJECTED]], dtype=torch.float64).expand(count, 2)
    none = torch.zeros(count, 2, 0, dtype=torch.float64)
    rollouts = Rollouts(
        n=2,
        tokens=tokens,
        length=lengths,
        finished=torch.ones(2 * count, dtype=torch.bool),
        logprob=torch.zeros(tokens.shape),
        model_logprob=torch.zeros(tokens.shape),
        near_tie=torch.zeros(tokens.shape, dtype=torch.bool),
    )
    scores = Scores(
        reward_PG=score_PG,
        utility_PGJ=none,
        audit_PGA=none,
        ref_logprob_PG=reference.double().view(count, 2),
    )
    samples = Samples(
        prompts=Prompts(
            text=[""] * count,
            kind=[""] * count,
            token_ids=[g.prompt for g in groups],
            key_P=torch.arange(count),
        ),
        rollouts=rollouts,
        texts=[""] * len(tokens),
        scores=scores,
        kl_PG=torch.zeros(count, 2, dtype=torch.float64),
        scaled=Units(reward=1.0, utility_J=[], audit_A=[]).apply(scores),
    )
    target = ScoredTarget(score=Score.plain(score_PG), coefficient=BETA)
    return samples, target


def stepper(
    parameters: list[torch.nn.Parameter], add_gradients: Callable[[], float], full: bool
) -> Callable[[], float]:
    """Returns a step that adds gradients, clips them and takes a step of AdamW; it returns the loss."""
    # `engine.policy` has it fused in the same cases.
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=full or parameters[0].is_cuda)

    def step() -> float:
        loss = add_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def trl(
    folder: Path,
    groups: list[packing.Group],
    reference: Tensor | None,
    *,
    full: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], float]:
    """Returns a step of TRL's DPOTrainer, with a PEFT adapter of the same linears or on all weights.

    The collator, forward and loss are the trainer's, and the same backward, clipping and AdamW follow;
    the step returns the loss.
    reference: log-probs as `reference_logprob` returns them; with None the trainer runs a forward pass of the
      reference in each step. With a 16-bit dtype trained weights are float32 under autocast, as with its flag
      bf16; frozen ones have the dtype.
    """
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [
        {"prompt_ids": g.prompt, "chosen_ids": g.responses[0], "rejected_ids": g.responses[1]} for g in groups
    ]
    if reference is not None:
        for row, (chosen, rejected) in zip(rows, reference.view(-1, 2).tolist(), strict=True):
            row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        options = trl.DPOConfig(
            output_dir=scratch,
            beta=BETA,
            max_length=None,
            report_to=[],
            use_cpu=device.type == "cpu",
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            disable_dropout=True,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if full else dtype)
        trainer = trl.DPOTrainer(
            model,
            args=options,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            peft_config=None if full else lora,
        )
    if reference is not None:
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    inputs = {name: x.to(device) for name, x in trainer.data_collator(rows).items()}
    trainer.model.to(device).train()

    def add_gradients() -> float:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        return float(loss.detach())

    return stepper([p for p in trainer.model.parameters() if p.requires_grad], add_gradients, full)


def sizes(groups: list[packing.Group]) -> tuple[int, int]:
    """Returns the packed tokens, each prompt counted once, and how many of them are predicted."""
    return sum(g.tokens for g in groups), sum(len(r) for g in groups for r in g.responses)


def floor(model: Decoder, groups: list[packing.Group], *, full: bool = False) -> dict[str, Ways]:
    """Returns the products that a step needs."""
    products = {}
    matrices_of = {"layers": layer_matrices(model), "head": [model.head_weight]}
    for (name, matrices), rows in zip(matrices_of.items(), sizes(groups), strict=True):
        products[name] = bare_products(matrices, rows)
        products[f"{name}, gradient"] = bare_products(matrices, rows, backward=True)
        if full:
            products[f"{name}, gradient of weights"] = weight_gradients(matrices, rows)
    return products
