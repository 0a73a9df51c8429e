"""Sequence-classification models as scorers."""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.chat import as_text, render
from engine.data.formats import first_line
from engine.errors import UserError
from engine.files import shown
from engine.model import packing
from engine.model.folder import check_text_files, resolve, stored_tensors
from engine.model.tokenizer import library_warnings_off, refuse_code
from engine.policy.forward import TOKENS_PER_FORWARD
from engine.scorers.base import Asked, LastForward, LoadContext, TextScorer, messages_of

LONGEST_TEXT = 4096


def classifier(spec: str, context: LoadContext) -> TextScorer:
    """Loads the scorer MODEL or MODEL#LABEL.

    Its score is the log-odds of the label, or the logit of a model that has only one. Without #LABEL a model
    of two labels is scored by the second. Scorers of several labels share the model and its forward pass.
    Raises: UserError where the model cannot be loaded, lacks that label, or has several and none is named.
    """
    path, _, label = spec.partition("#")
    if path not in context.loaded:
        context.loaded[path] = _load_classifier(spec, context)
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

    def function(prompts: list[Asked], responses: list[str]) -> list[float]:
        logits_NL = model.logits(prompts, responses)
        if logits_NL.shape[1] == 1:
            return logits_NL[:, 0].tolist()
        others = logits_NL.clone()
        others[:, column] = -math.inf
        return (logits_NL[:, column] - others.logsumexp(dim=1)).tolist()

    return TextScorer(
        name=spec,
        function=function,
        reads_messages=True,
        max_tokens=model.reader.max_tokens,
        warnings=model.reader.warnings,
    )


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
    reader: "Reader"


def _load_classifier(spec: str, context: LoadContext) -> Classifier:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve(spec.partition("#")[0])
    refuse_code(folder)
    stored_tensors(folder)
    check_text_files(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"scorer {spec}: an adapter and a model in one folder; "
            "merge the adapter into the model, or remove one of them."
        )
    try:
        with library_warnings_off():
            network, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
            network = network.to(context.device).eval()
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
    if others := loading["mismatched_keys"]:
        name, stored, wanted = min(others)
        raise UserError(
            f"scorer {spec}: tensor {name} has shape {tuple(stored)}, config.json wants {tuple(wanted)}; "
            "use a config.json and weights that belong together."
        )
    if unused := loading["unexpected_keys"]:
        print(
            f"scorer {spec}: {len(unused)} tensor(s) of its weights, such as {shown(min(unused))}, are of no "
            "use to the model.",
            file=sys.stderr,
        )
    shape = network.config.get_text_config()
    pad = getattr(shape, "pad_token_id", None)
    # A causal model scores the last token that is not its padding, so both must mean the same token by it.
    pads = pad is not None and pad == tokenizer.pad_token_id
    if pad is None:
        shape.pad_token_id = -1  # no token: without any, a model of transformers takes one text at a time
    reader = Reader(
        spec=spec, tokenizer=tokenizer, max_tokens=_positions(network, tokenizer), now=context.now
    )

    @torch.inference_mode()
    def logits(prompts: list[Asked], responses: list[str]) -> Tensor:
        inputs = reader.encode(prompts, responses)
        logits_NL = torch.empty(len(prompts), network.config.num_labels)
        lengths = list(map(len, inputs["input_ids"]))
        batches = packing.of_like_length(lengths, TOKENS_PER_FORWARD)
        for rows in batches if pads else of_one_length(lengths, batches):
            batch = {name: [values[i] for i in rows] for name, values in inputs.items()}
            if pads:
                padded = tokenizer.pad(batch, padding_side="right", return_tensors="pt")
            else:
                padded = {name: torch.tensor(values) for name, values in batch.items()}
            on_device = {name: values.to(context.device) for name, values in padded.items()}
            logits_NL[rows] = network(**on_device).logits.float().cpu()
        return logits_NL

    labels = {str(name): column for column, name in network.config.id2label.items()}
    return Classifier(logits=LastForward(logits), labels=labels, reader=reader)


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


@dataclass(kw_only=True)
class Reader:
    """Writes a conversation and its answer as a classifier reads them."""

    spec: str
    tokenizer: Any
    max_tokens: int
    now: datetime | None
    n_read: int = 0  # texts since the last warning
    n_cut: int = 0  # those of them that were too long

    def encode(self, prompts: list[Asked], responses: list[str]) -> dict[str, list[list[int]]]:
        """Tokenises each prompt with its response: by the chat template, else as a pair of texts.

        Of what is too long the start of the prompt is cut, never the response.
        Raises: UserError where a response alone is too long, or the template refuses a conversation.
        """
        if self.tokenizer.chat_template:
            turns = zip(prompts, responses, strict=True)
            texts = [self._chat(prompt, response) for prompt, response in turns]
            inputs = dict(self.tokenizer(texts, add_special_tokens=False, verbose=False))
        else:
            texts = [as_text(messages_of(prompt)) for prompt in prompts]
            inputs = dict(self.tokenizer(texts, responses, verbose=False))
        self.n_read += len(texts)
        for i, ids in enumerate(inputs["input_ids"]):
            if len(ids) > self.max_tokens:
                self.n_cut += 1
                cut = self._cut_chat if self.tokenizer.chat_template else self._cut_pair
                for name, values in cut(texts[i], responses[i]).items():
                    inputs[name][i] = values
        return inputs

    def warnings(self) -> list[str]:
        """Says how many texts were cut since the last call."""
        n_read, n_cut, self.n_read, self.n_cut = self.n_read, self.n_cut, 0, 0
        if not n_cut:
            return []
        return [
            f"scorer {self.spec} reads {self.max_tokens} tokens: the prompt's start was cut in {n_cut} of "
            f"{n_read} texts"
        ]

    def _chat(self, prompt: Asked, response: str) -> str:
        messages = [*messages_of(prompt), {"role": "assistant", "content": response}]
        try:
            return render(messages, self.tokenizer, self.now, answered=True)
        except Exception as error:
            raise UserError(
                f"scorer {self.spec}: its chat template refuses the prompt {str(prompt)[:60]!r} "
                f"({first_line(error)}); give other prompts or another scorer."
            ) from error

    def _cut_chat(self, text: str, response: str) -> dict[str, list[int]]:
        inputs = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = inputs["input_ids"]
        start = int(ids[0] == self.tokenizer.bos_token_id)
        _, _, behind = text.rpartition(response.strip())
        answer = self.tokenizer.encode(response.strip() + behind, add_special_tokens=False, verbose=False)
        self._check_answer(start + len(answer), response)
        kept = len(ids) - self.max_tokens + start
        return {name: [*values[:start], *values[kept:]] for name, values in inputs.items()}

    def _cut_pair(self, text: str, response: str) -> dict[str, list[int]]:
        self._check_answer(len(self.tokenizer("", response, verbose=False)["input_ids"]), response)
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            return dict(self.tokenizer(text, response, truncation="only_first", max_length=self.max_tokens))
        finally:
            self.tokenizer.truncation_side = side

    def _check_answer(self, n_tokens: int, response: str) -> None:
        if n_tokens >= self.max_tokens:
            raise UserError(
                f"scorer {self.spec} reads {self.max_tokens} tokens, the response {response[:60]!r} has "
                f"{n_tokens}; lower --max-new-tokens or use another scorer."
            )
