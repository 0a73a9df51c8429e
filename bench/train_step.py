"""One optimizer step of DPO with LoRA on every linear against its floor and TRL's DPOTrainer on the same tokens.

The floor is the bare matrix products: all layers on the packed tokens (each prompt once), forward and for the gradient of the states, and
the head on the completion tokens, the same two. The adapter's own products are not in it. Ours has the reference's log-probs already, as
they come with the samples; TRL runs once as it does by default, with a forward pass of the reference in every step, and once with
log-probs precomputed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.rollout import bare_products
from engine import packing
from engine.lora import Adapter, Shape
from engine.model import Decoder
from kernels import lagrangian_preference_loss
from kernels.reference import PreferenceLoss

RANK, BETA, RATE = 8, 0.1, 1e-4


def batch(vocabulary: int, pairs: int, prompt: int, response: int) -> list[packing.Group]:
    """Pairs of random responses to random prompts."""
    g = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary // 2, (count,), generator=g).tolist()

    return [packing.Group(draw(prompt), [draw(response), draw(response)], [2 * k, 2 * k + 1]) for k in range(pairs)]


def _loss(model: Decoder, groups: list[packing.Group], adapter: Adapter | None, reference: Tensor) -> PreferenceLoss:
    packed = packing.pack(groups, model.device)
    hidden = model.run(model.embed_tokens(packed.tokens), packed.layout, 0, model.config.num_layers, adapter)
    hidden = model.final_norm(hidden).index_select(0, packed.predict_T)
    pairs = torch.arange(2 * len(groups)).view(-1, 2)
    return lagrangian_preference_loss(
        hidden, model.head_weight, packed.target_T, packed.cu_seqlens, pairs, None, None, None, reference, beta=BETA, labels="given",
        preference=torch.ones(len(pairs), device=model.device),
    )  # fmt: skip


@torch.no_grad()
def reference_logprob(model: Decoder, groups: list[packing.Group]) -> Tensor:
    """Log-probs of all responses under the reference, [2 K]; chosen and rejected ones in turn."""
    return _loss(model, groups, None, torch.zeros(2 * len(groups), device=model.device)).logprob


def ours(model: Decoder, groups: list[packing.Group], reference: Tensor) -> Callable[[], Tensor]:
    """Forward, loss, backward, clipping and AdamW on an adapter of all layers; returns the loss."""
    adapter = Adapter(Shape.of(model, 0), rank=RANK, alpha=2 * RANK, dtype=model.dtype, device=model.device, seed=0)
    return _stepper(list(adapter.parameters()), lambda: _loss(model, groups, adapter, reference).loss)


def _stepper(parameters: list[torch.nn.Parameter], loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def step() -> Tensor:
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def trl(folder: Path, groups: list[packing.Group], reference: Tensor | None) -> Callable[[], Tensor]:
    """TRL's DPOTrainer with a PEFT adapter of the same linears: its own collator, forward and loss, then the same backward, clipping and
    AdamW; returns the loss. reference: log-probs as `reference_logprob` gives them; None: its own forward pass in each step."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt_ids": g.prompt, "chosen_ids": g.responses[0], "rejected_ids": g.responses[1]} for g in groups]
    if reference is not None:
        for row, (chosen, rejected) in zip(rows, reference.view(-1, 2).tolist(), strict=True):
            row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    with tempfile.TemporaryDirectory() as scratch:
        options = trl.DPOConfig(
            output_dir=scratch, beta=BETA, max_length=None, report_to=[], use_cpu=True, gradient_checkpointing=False, bf16=False,
            disable_tqdm=True, dataloader_pin_memory=False, disable_dropout=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = trl.DPOTrainer(
            model, args=options, processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears, task_type="CAUSAL_LM"),
        )  # fmt: skip
    trainer.precompute_ref_logps = reference is not None
    inputs = trainer.data_collator(rows)
    trainer.model.train()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return _stepper(parameters, lambda: trainer.compute_loss(trainer.model, dict(inputs)))


def floor(model: Decoder, groups: list[packing.Group]) -> dict[str, dict[str, Callable[[], object]]]:
    """product -> who does it -> step."""
    matrices = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    tokens, completions = sum(g.tokens for g in groups), sum(len(r) for g in groups for r in g.responses)
    return {
        "layers": bare_products(matrices, tokens),
        "layers, gradient": bare_products(matrices, tokens, backward=True),
        "head": bare_products([model.head_weight], completions),
        "head, gradient": bare_products([model.head_weight], completions, backward=True),
    }
