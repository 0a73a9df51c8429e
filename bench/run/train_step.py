"""One optimizer step of DPO against its floor and TRL's DPOTrainer on the same tokens: LoRA on every linear, or all weights.

The floor is the bare matrix products: all layers on the packed tokens (each prompt once), forward, for the gradient of the states and,
where all weights are trained, for that of the weights, and the head on the completion tokens, the same. The adapter's own products are
not in it. Ours is what `engine.policy.fit` does in a step, with an optimizer that stays. It has the reference's log-probs already, as they
come with the samples; TRL runs once as it does by default, with a forward pass of the reference in every step, and once with log-probs
precomputed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.run.rollout import bare_products
from engine import packing, policy
from engine.config import DpoConfig
from engine.full import FullWeights
from engine.lora import Adapter
from engine.model import Decoder
from engine.pairs import within_prompts
from engine.records import Prompts, Rollouts, Scores, Target
from engine.score import frozen_forward

RANK, BETA, RATE = 8, 0.1, 1e-4
# Expected Bradley-Terry labels of scores so far apart are those of the responses called chosen.
CONFIG = DpoConfig(labels="soft", temperature=1.0)
CHOSEN, REJECTED = 100.0, 0.0
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def batch(vocabulary: int, pairs: int, prompt: int, response: int) -> list[packing.Group]:
    """Pairs of random responses to random prompts."""
    g = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary // 2, (count,), generator=g).tolist()

    return [packing.Group(draw(prompt), [draw(response), draw(response)], [2 * k, 2 * k + 1]) for k in range(pairs)]


@torch.no_grad()
def reference_logprob(model: Decoder, groups: list[packing.Group]) -> Tensor:
    """Log-probs of all responses under the reference, float64 [2 K]; chosen and rejected ones in turn."""
    return frozen_forward(model, groups, [], temperature=CONFIG.temperature, memory_budget_bytes=CONFIG.memory_budget_bytes)[1]


def ours(model: Decoder, groups: list[packing.Group], reference: Tensor, *, full: bool = False) -> Callable[[], float]:
    """Forward, loss, backward, clipping and AdamW on an adapter of all layers, or on all weights; returns the loss."""
    weights = FullWeights(model) if full else Adapter.on(model, rank=RANK, alpha=2 * RANK, share=0.0, seed=0)
    samples, target = _samples(groups, reference)
    pairs = within_prompts(target.score_PG, list(range(len(groups))), 2)

    def add_gradients() -> float:
        total = 0.0
        for part, first in policy.parts(pairs, groups, CONFIG.tokens_per_forward):
            result = policy._preference_loss(CONFIG, model, samples, target, weights, None, part, 0, first)
            total += policy._add_gradient(result.loss, policy._share(CONFIG.labels, part, pairs))
        return total

    return stepper(list(weights.parameters()), add_gradients, full)


def _samples(groups: list[packing.Group], reference: Tensor) -> tuple[policy.Samples, Target]:
    """The groups as scored samples of a run, and what a step fits: the first response of each pair is chosen."""
    count, lengths = len(groups), torch.tensor([len(r) for g in groups for r in g.responses])
    tokens = torch.tensor([r + [0] * (int(lengths.max()) - len(r)) for g in groups for r in g.responses])
    score_PG = torch.tensor([[CHOSEN, REJECTED]], dtype=torch.float64).expand(count, 2)
    none = torch.zeros(count, 2, 0, dtype=torch.float64)
    samples = policy.Samples(
        prompts=Prompts(text=[""] * count, kind=[""] * count, token_ids=[g.prompt for g in groups], key_P=torch.arange(count)),
        rollouts=Rollouts(
            n=2, tokens=tokens, length=lengths, finished=torch.ones(2 * count, dtype=torch.bool), logprob=torch.zeros(tokens.shape),
            model_logprob=torch.zeros(tokens.shape), near_tie=torch.zeros(tokens.shape, dtype=torch.bool),
        ),
        scores=Scores(reward_PG=score_PG, utility_PGJ=none, audit_PGA=none, ref_logprob_PG=reference.double().view(count, 2)),
        lower=None,
    )  # fmt: skip
    return samples, Target(lam_J=torch.zeros(0, dtype=torch.float64), score_PG=score_PG, coefficient=BETA)


def stepper(parameters: list[torch.nn.Parameter], add_gradients: Callable[[], float], full: bool) -> Callable[[], float]:
    """Add gradients, clip them and take a step of AdamW; returns the loss."""
    # Fused where `engine.policy` has it so.
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=full or parameters[0].is_cuda)

    def step() -> float:
        loss = add_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def trl(
    folder: Path, groups: list[packing.Group], reference: Tensor | None, *, full: bool, dtype: torch.dtype, device: torch.device
) -> Callable[[], float]:  # fmt: skip
    """TRL's DPOTrainer with a PEFT adapter of the same linears, or on all weights: its own collator, forward and loss, then the same
    backward, clipping and AdamW; returns the loss. reference: log-probs as `reference_logprob` gives them; None: its own forward pass in
    each step. With a 16-bit dtype trained weights are float32 under autocast, as with its flag bf16; frozen ones have the dtype."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt_ids": g.prompt, "chosen_ids": g.responses[0], "rejected_ids": g.responses[1]} for g in groups]
    if reference is not None:
        for row, (chosen, rejected) in zip(rows, reference.view(-1, 2).tolist(), strict=True):
            row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        options = trl.DPOConfig(
            output_dir=scratch, beta=BETA, max_length=None, report_to=[], use_cpu=device.type == "cpu", gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16, disable_tqdm=True, dataloader_pin_memory=False, disable_dropout=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if full else dtype)
        trainer = trl.DPOTrainer(
            model, args=options, processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            peft_config=None if full else lora,
        )  # fmt: skip
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
    """Packed tokens, each prompt counted once, and those of them that are predicted."""
    return sum(g.tokens for g in groups), sum(len(r) for g in groups for r in g.responses)


def floor(model: Decoder, groups: list[packing.Group], *, full: bool = False) -> dict[str, dict[str, Callable[[], object]]]:
    """product -> who does it -> step."""
    layers = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    products = {}
    for name, matrices, rows in zip(("layers", "head"), (layers, [model.head_weight]), sizes(groups), strict=True):
        products[name] = bare_products(matrices, rows)
        products[f"{name}, gradient"] = bare_products(matrices, rows, backward=True)
        if full:
            products[f"{name}, gradient of weights"] = weight_gradients(matrices, rows)
    return products


def weight_gradients(matrices: list[Tensor], tokens: int) -> dict[str, Callable[[], object]]:
    """Products of `tokens` rows of gradients with as many of states, of the shapes [N, K] of `matrices`."""
    shapes = [tuple(w.shape) for w in matrices]
    rows = {size: matrices[0].new_empty(tokens, size).normal_() for shape in shapes for size in shape}
    out = {shape: matrices[0].new_empty(shape) for shape in shapes}

    def by_mm() -> None:
        for n, k in shapes:
            torch.mm(rows[n].t(), rows[k], out=out[n, k])

    return {"torch.mm": by_mm}
