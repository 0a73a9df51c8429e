"""Sequence-classification models of transformers: encoders, and decoders that are none of the project's."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import one_line, shown
from engine.model import packing
from engine.model.checkpoint import read_config, stored_tensors
from engine.model.packing import TOKENS_PER_FORWARD
from engine.model.tokenizer import library_warnings_off
from engine.scorers.base import Asked, LastForward, LoadContext
from engine.scorers.labels import Labels
from engine.scorers.reader import LONGEST_TEXT, Reader
from engine.scorers.recipes import Recipe

# The matrices whose rows are the labels, by the names that the families give them.
LABEL_ROWS = re.compile(r"(score|classifier|logits_proj|classification_head)(\.out_proj|\.dense)?\.weight")


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A loaded model that gives a logit for each of its labels."""

    logits: LastForward  # (prompts, responses) -> float32 [N, labels]
    labels: Labels
    reader: Reader
    sampled: bool = False  # `logits` reads how responses were sampled too
    notes: tuple[str, ...] = ()  # what the user should know of the model, in lines


def load_classifier(spec: str, folder: Path, recipe: Recipe, context: LoadContext) -> Classifier:
    """Loads a sequence-classification model of transformers. Raises: UserError where it cannot be loaded."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [tensor.shape[0] for name, tensor in stored_tensors(folder).items() if LABEL_ROWS.fullmatch(name)]
    try:
        with library_warnings_off():
            network, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=context.dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                # The tensor counts: config.json may leave the number out, and then means 2.
                **({"num_labels": rows[0]} if len(rows) == 1 else {}),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"scorer {spec}: no sequence-classification model could be loaded ({shown(one_line(error))}); "
            "give its local folder."
        ) from error
    if missing := loading["missing_keys"]:
        raise UserError(
            f"scorer {spec}: it lacks tensor {min(missing)}; give a complete sequence-classification model."
        )
    if others := loading["mismatched_keys"]:
        name, stored, wanted = min(others)
        raise UserError(
            f"scorer {spec}: tensor {name} has shape {tuple(stored)}, config.json wants {tuple(wanted)}; "
            "use a config.json and weights that belong together."
        )
    network = network.eval()
    shape = network.config.get_text_config()
    pad = getattr(shape, "pad_token_id", None)
    # A causal model scores the last token that is not its padding, so both must mean the same token by it.
    pads = pad is not None and pad == tokenizer.pad_token_id
    if pad is None:
        shape.pad_token_id = -1  # no token: without any, a model of transformers takes one text at a time
    reader = Reader(
        spec=spec,
        tokenizer=tokenizer,
        max_tokens=_positions(network, tokenizer),
        now=context.now,
        recipe=recipe,
    )

    @torch.inference_mode()
    def logits(prompts: list[Asked], responses: list[str]) -> Tensor:
        inputs = reader.encode(prompts, responses)
        logits_NL = torch.empty(len(prompts), network.config.num_labels)
        lengths = list(map(len, inputs["input_ids"]))
        batches = packing.of_like_length(lengths, TOKENS_PER_FORWARD)
        with context.placed(network):
            for rows in batches if pads else of_one_length(lengths, batches):
                batch = {name: [values[i] for i in rows] for name, values in inputs.items()}
                if pads:
                    padded = tokenizer.pad(batch, padding_side="right", return_tensors="pt")
                else:
                    padded = {name: torch.tensor(values) for name, values in batch.items()}
                on_device = {name: values.to(context.device) for name, values in padded.items()}
                logits_NL[rows] = network(**on_device).logits.float().cpu()
        return logits_NL

    labels = Labels.of(read_config(folder), network.config.num_labels)
    notes = of_no_use(spec, loading["unexpected_keys"])
    return Classifier(logits=LastForward(logits), labels=labels, reader=reader, notes=notes)


def of_no_use(spec: str, tensors: Collection[str]) -> tuple[str, ...]:
    """Says that nothing reads some tensors of a scorer's weights, in a line."""
    if not tensors:
        return ()
    return (
        f"scorer {spec}: {len(tensors)} tensor(s) of its weights, such as {shown(min(tensors))}, are of no "
        "use to the model",
    )


def of_one_length(lengths: list[int], batches: Iterable[list[int]]) -> Iterator[list[int]]:
    """Cuts batches where the length changes, so that no text in them is padded."""
    for rows in batches:
        yield from (list(same) for _, same in groupby(rows, key=lengths.__getitem__))


def _positions(network: torch.nn.Module, tokenizer) -> int:
    """Returns the length of the longest text that a model reads."""
    config = network.config.get_text_config()
    limits = [LONGEST_TEXT, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # Models of RoBERTa's kind count positions from behind the padding's.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limit for limit in limits if limit is not None and limit > 0)
