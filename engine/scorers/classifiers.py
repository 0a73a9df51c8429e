"""Sequence-classification models as scorers."""

import math

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import packing
from engine.model.folder import resolve, stored_tensors
from engine.model.tokenizer import refuse_code
from engine.policy.forward import TOKENS_PER_FORWARD
from engine.scorers.base import Reading, Shared, TextFunction


def classifier(spec: str, device: torch.device, shared: Shared) -> TextFunction:
    """A sequence-classification model: its single logit, or the log-odds of one label (`#label`; of two labels the second). Scorers of
    several labels share the model and its forward pass."""
    path, _, label = spec.partition("#")
    if path not in shared:
        shared[path] = _logits(spec, device)
    logits, labels = shared[path]
    if label and label not in labels:
        raise UserError(f"scorer {spec}: the model has no label {label}; it has {', '.join(labels)}.")
    if not label and len(labels) > 2:
        raise UserError(f"scorer {spec}: the model has {len(labels)} labels ({', '.join(labels)}); name one: {path}#{next(iter(labels))}.")
    chosen = labels[label] if label else len(labels) - 1

    def function(prompts: list[str], responses: list[str]) -> list[float]:
        logits_NL = logits(prompts, responses)
        if logits_NL.shape[1] == 1:
            return logits_NL[:, 0].tolist()
        others = logits_NL.clone()
        others[:, chosen] = -math.inf
        return (logits_NL[:, chosen] - others.logsumexp(dim=1)).tolist()

    return function


def _logits(spec: str, device: torch.device) -> tuple[Reading, dict[str, int]]:
    """(texts -> logits float32 [N, labels] of a sequence-classification model, its labels)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve(spec.partition("#")[0])
    refuse_code(folder)
    stored_tensors(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"scorer {spec}: an adapter and a model in one folder; merge the adapter into the model, or remove one of them.")
    try:
        network, found = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        network = network.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"scorer {spec}: no sequence-classification model could be loaded ({reason}); give its local folder.") from error
    if found["missing_keys"]:
        raise UserError(f"scorer {spec}: it lacks tensor {min(found['missing_keys'])}; give a complete sequence-classification model.")
    length = min(tokenizer.model_max_length, 4096)

    @torch.inference_mode()
    def read(prompts: list[str], responses: list[str]) -> Tensor:
        if tokenizer.chat_template:
            pairs = zip(prompts, responses, strict=True)
            chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
            joined = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            inputs = tokenizer(joined, add_special_tokens=False, truncation=True, max_length=length)
        else:
            inputs = tokenizer(prompts, responses, truncation=True, max_length=length)
        found = torch.empty(len(prompts), network.config.num_labels)
        for chosen in packing.of_like_length(list(map(len, inputs["input_ids"])), TOKENS_PER_FORWARD):
            batch = tokenizer.pad({name: [values[i] for i in chosen] for name, values in inputs.items()}, return_tensors="pt")
            found[chosen] = network(**batch.to(device)).logits.float().cpu()
        return found

    return Reading(read), {str(name): index for index, name in network.config.id2label.items()}
