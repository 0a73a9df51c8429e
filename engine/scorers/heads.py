"""Heads that sit on another trunk than the policy."""

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model.folder import fingerprint, load
from engine.model.packing import Group
from engine.model.tokenizer import load_tokenizer
from engine.policy.forward import frozen_forward
from engine.scorers.base import Head, Reading, Shared, TextFunction


def on_its_own_trunk(head: Head, device: torch.device, shared: Shared) -> TextFunction:
    """A head made for another checkpoint than the policy: that trunk (the quickstart model) is loaded and reads the texts, once for all
    heads on it."""
    if head.trunk not in shared:
        shared[head.trunk] = _trunk(head, device)
    states, layers = shared[head.trunk]
    layers.add(head.layer)
    return lambda prompts, responses: head(states(prompts, responses)[head.layer]).tolist()


def _trunk(head: Head, device: torch.device) -> tuple[Reading, set[int]]:
    """(texts -> layer -> mean states of each response [N, D], the layers wanted: those of the heads that share it)."""
    from engine import quickstart
    from engine.data.prompts import chat_ids

    folder = quickstart.model_folder()
    if fingerprint(folder) != head.trunk:
        raise UserError(f"head {head.name} was made for another model (fingerprint {head.trunk}); use it with --model of that model.")
    trunk, tokenizer = load(folder, dtype=torch.float32, device=device), load_tokenizer(folder)
    layers: set[int] = set()

    def read(prompts: list[str], responses: list[str]) -> dict[int, Tensor]:
        all_groups = [
            Group(
                chat_ids([{"role": "user", "content": p}], tokenizer, "", "prompt"),
                [tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]],
                [i],
            )
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        return frozen_forward(trunk, all_groups, sorted(layers), temperature=None)[0]

    return Reading(read), layers
