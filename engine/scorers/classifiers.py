"""Sequence-classification models as scorers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import packing
from engine.model.folder import resolve, stored_tensors
from engine.model.tokenizer import refuse_code
from engine.policy.forward import TOKENS_PER_FORWARD
from engine.scorers.base import LastForward, LoadContext, TextFunction


def classifier(spec: str, context: LoadContext) -> TextFunction:
    """Loads the scorer MODEL or MODEL#LABEL.

    Its score is the log-odds of the label, or the logit of a model that has only one. Without #LABEL a model
    of two labels is scored by the second. Scorers of several labels share the model and its forward pass.
    Raises: UserError where the model cannot be loaded, lacks that label, or has several and none is named.
    """
    path, _, label = spec.partition("#")
    if path not in context.loaded:
        context.loaded[path] = _load_classifier(spec, context.device)
    model = context.loaded[path]
    names = ", ".join(model.labels)
    if label and label not in model.labels:
        raise UserError(f"scorer {spec}: the model has no label {label}; it has {names}.")
    if not label and len(model.labels) > 2:
        first = next(iter(model.labels))
        raise UserError(
            f"scorer {spec}: the model has {len(model.labels)} labels ({names}); name one: {path}#{first}."
        )
    column = model.labels[label] if label else len(model.labels) - 1

    def function(prompts: list[str], responses: list[str]) -> list[float]:
        logits_NL = model.logits(prompts, responses)
        if logits_NL.shape[1] == 1:
            return logits_NL[:, 0].tolist()
        others = logits_NL.clone()
        others[:, column] = -math.inf
        return (logits_NL[:, column] - others.logsumexp(dim=1)).tolist()

    return function


def read_files(path_or_id: str) -> tuple[Path, dict[str, Path]]:
    """Finds a classifier's folder, and by name every file in it that loading may read.

    Raises: UserError where there is no such folder.
    """
    folder = resolve(path_or_id)
    suffixes = {".json", ".safetensors", ".model", ".jinja", ".txt"}
    files = (file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    return folder, {str(file.relative_to(folder)): file for file in files}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A loaded sequence-classification model."""

    logits: LastForward  # (prompts, responses) -> float32 [N, labels]
    labels: dict[str, int]  # name -> column of the logits


def _load_classifier(spec: str, device: torch.device) -> Classifier:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve(spec.partition("#")[0])
    refuse_code(folder)
    stored_tensors(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"scorer {spec}: an adapter and a model in one folder; "
            "merge the adapter into the model, or remove one of them."
        )
    try:
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        network = network.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"scorer {spec}: no sequence-classification model could be loaded ({reason}); "
            "give its local folder."
        ) from error
    if missing := loading["missing_keys"]:
        raise UserError(
            f"scorer {spec}: it lacks tensor {min(missing)}; give a complete sequence-classification model."
        )
    max_length = min(tokenizer.model_max_length, 4096)

    @torch.inference_mode()
    def logits(prompts: list[str], responses: list[str]) -> Tensor:
        if tokenizer.chat_template:
            turns = zip(prompts, responses, strict=True)
            chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in turns]
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            inputs = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_length)
        else:
            inputs = tokenizer(prompts, responses, truncation=True, max_length=max_length)
        logits_NL = torch.empty(len(prompts), network.config.num_labels)
        lengths = list(map(len, inputs["input_ids"]))
        for rows in packing.of_like_length(lengths, TOKENS_PER_FORWARD):
            batch = {name: [values[i] for i in rows] for name, values in inputs.items()}
            padded = tokenizer.pad(batch, return_tensors="pt").to(device)
            logits_NL[rows] = network(**padded).logits.float().cpu()
        return logits_NL

    labels = {str(name): column for column, name in network.config.id2label.items()}
    return Classifier(logits=LastForward(logits), labels=labels)
