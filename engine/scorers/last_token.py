"""Models that are read at the last token of a text, on the project's decoder: classifiers, reward and cost
models, and guards.

A score is made of rows of a matrix times the state of that token. The rows are a head of the folder's
(`HEADS`), or those of the output matrix for the tokens that a guard may answer. Texts with the same prompt
share a forward pass over what they begin with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from engine.data.chat import check_known
from engine.errors import UserError
from engine.files import shown
from engine.model import packing
from engine.model.checkpoint import Checkpoint, Stored, fitted, read_config, stored_tensors
from engine.model.decoder import Decoder
from engine.model.folder import filled
from engine.model.packing import Group
from engine.scorers.base import Asked, LoadContext, Sampled
from engine.scorers.labels import Labels
from engine.scorers.reader import Reader

# Tokens of a forward pass; scores of attention that are capped are all stored.
TOKENS_CPU, TOKENS_GPU = 2048, 32768
LONGEST_GROUP = 1024  # tokens of texts that share a prompt, or twice the prompt
# What config.json says of a head, which the decoder does not know.
HEAD_KEYS = {
    "architectures", "auto_map", "num_labels", "id2label", "label2id", "problem_type", "score_type",
    "score_dim", "score_bias", "bias", "do_normalize", "normalizer_type", "normalize_function", "mean", "var",
    "std", "momentum",
}  # fmt: skip
# The names of a head's tensors, with and without a bias.
HEADS = {"score": "classifier", "score_head": "beaver", "regression_head": "regression"}
# A normalizer's tensors, and those that trainers leave behind and nothing reads.
NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")
UNUSED = ("mean", "std")


class Rows(NamedTuple):
    """Rows that are multiplied with the state of a token: (softcap(state weight^T) + bias - mean) / std."""

    weight_KD: Tensor  # float32
    bias_K: Tensor | float = 0.0
    mean: float = 0.0
    std: float = 1.0
    softcap: float | None = None

    def __call__(self, state_ND: Tensor) -> Tensor:
        """Computes [N, K] in float32, on the device of the states."""
        weight = self.weight_KD.to(state_ND.device)
        logits = state_ND.float() @ weight.T
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        bias = self.bias_K if isinstance(self.bias_K, float) else self.bias_K.to(state_ND.device)
        return (logits + bias - self.mean) / self.std


@dataclass(frozen=True, kw_only=True)
class HeadFolder:
    """A folder of a decoder with a head of rows, or of a decoder alone."""

    folder: Path
    config: dict  # config.json
    kind: str  # a value of `HEADS`; "causal" without a head
    checkpoint: Checkpoint  # of the decoder
    head: dict[str, Stored]
    unused: tuple[str, ...]  # tensors that count for nothing


def examine(folder: Path) -> HeadFolder | None:
    """Reads the headers of a folder; None where they are no decoder of this project's with a head.

    Raises: UserError where the folder's files cannot be read; for a head that no other library reads, also
    where its decoder is not supported.
    """
    raw, stored = read_config(folder), stored_tensors(folder)
    names = [name for name in HEADS if f"{name}.weight" in stored]
    kind = HEADS[names[0]] if names else "causal"
    own = {f"{name}.{part}" for name in names[:1] for part in ("weight", "bias")} & stored.keys()
    own |= {name for name in NORMALIZER if kind == "beaver" and name in stored}
    unused = tuple(name for name in UNUSED if name in stored)
    if kind == "causal" and not causal(raw, stored):
        return None
    body = {name: tensor for name, tensor in stored.items() if name not in own and name not in unused}
    config = {key: value for key, value in raw.items() if kind == "causal" or key not in HEAD_KEYS}
    config.pop("auto_map", None)
    if kind != "causal":
        body.pop("lm_head.weight", None)
        config["tie_word_embeddings"] = True  # there is no output matrix
    try:
        checkpoint = fitted(folder, config, body)
    except UserError:
        if kind in ("beaver", "regression"):
            raise
        return None
    head = {name: stored[name] for name in own}
    return HeadFolder(folder=folder, config=raw, kind=kind, checkpoint=checkpoint, head=head, unused=unused)


def causal(raw: dict, stored: dict[str, Stored]) -> bool:
    """Tells whether a folder is a language model's: it has an output matrix, or says that it writes."""
    named = raw.get("architectures")
    named = named[0] if named and isinstance(named, list) else named
    if isinstance(named, str):
        return named.endswith(("ForCausalLM", "ForConditionalGeneration"))
    return "lm_head.weight" in stored


def read_rows(found: HeadFolder) -> Rows:
    """Reads the head of a folder. Raises: UserError where it does not fit the decoder, or is not finite."""
    values = {}
    for name, tensor in found.head.items():
        with safe_open(tensor.file, framework="pt") as opened:
            values[name] = opened.get_tensor(name).float()
        if not values[name].isfinite().all():
            raise UserError(f"{shown(tensor.file)}: tensor {name} is not finite; use another checkpoint.")
    weight, bias, mean, std = *_weight_and_bias(found, values), 0.0, 1.0
    if found.kind == "beaver" and found.config.get("do_normalize"):
        mean, std = _normalizer(found, values)
    return Rows(weight, bias, mean, std)


def _weight_and_bias(found: HeadFolder, values: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
    weight = next(value for name, value in values.items() if name.endswith(".weight"))
    bias = next((value for name, value in values.items() if name.endswith(".bias")), 0.0)
    D = found.checkpoint.config.hidden_size
    if (
        weight.ndim != 2
        or weight.shape[1] != D
        or (isinstance(bias, Tensor) and bias.shape != weight.shape[:1])
    ):
        raise UserError(
            f"{shown(found.folder)}: the head has shape {list(weight.shape)}, its model has states of {D}; "
            "use a config.json and weights that belong together."
        )
    return weight, bias


def _normalizer(found: HeadFolder, values: dict[str, Tensor]) -> tuple[float, float]:
    """Returns what is subtracted from a score of a Beaver model, and what divides it.

    safe-rlhf subtracts the mean of a reward model only: 0 stays the border of a cost.
    """
    raw = found.config
    mean, var = (
        float(values[f"normalizer.{key}"])
        if f"normalizer.{key}" in values
        else float(raw.get(key) or default)
        for key, default in (("mean", 0.0), ("var", 1.0))
    )
    return 0.0 if raw.get("score_type") == "cost" else mean, var**0.5 + 1e-8


@dataclass(frozen=True, kw_only=True)
class LastToken:
    """A loaded decoder whose states at the last token of texts are read."""

    spec: str
    network: Decoder
    context: LoadContext
    rows: Rows | None  # the folder's head
    labels: Labels | None
    padding: int | None  # the token that transformers takes for no part of a text: its last ones do not count

    def outputs(self, tokens: Sequence[int]) -> Rows:
        """Returns the rows of the output matrix for these tokens, with the family's softcap."""
        weight = self.network.head_weight[list(tokens)].float()
        return Rows(weight, softcap=self.network.config.logit_softcap)

    @torch.inference_mode()
    def logits(self, prompts: list[Asked], ids: list[list[int]], rows: Rows) -> Tensor:
        """Computes the logits [N, K] of the rows at the last token of each of N texts, float32.

        prompts: those of the texts, to find texts that begin alike.
        """
        check_known([max(map(max, ids))], self.network.config.vocab_size, f"scorer {self.spec}")
        if self.padding is not None:
            ids = [_without_end(text, self.padding) for text in ids]
        found = torch.empty(len(ids), len(rows.weight_KD))
        capped = self.network.config.attention_softcap is not None
        gpu = self.context.device.type == "cuda" and not capped
        with self.context.placed(self.network):
            for batch in packing.batches(
                shared(prompts, ids), TOKENS_GPU if gpu else TOKENS_CPU, longest=packing.WHOLE
            ):
                packed = packing.pack(batch, self.network.device)
                last = packed.state_T[packed.cu_seqlens[1:] - 1]
                states = self.network(packed.tokens, packed.layout).index_select(0, last)
                found[[row for group in batch for row in group.rows]] = rows(states).cpu()
        return found


def load(spec: str, found: HeadFolder, context: LoadContext) -> LastToken:
    """Loads the weights. Raises: UserError where they cannot be used."""
    rows = labels = None
    if found.kind != "causal":
        rows = read_rows(found)
        labels = Labels.of(found.config, len(rows.weight_KD))
    # Where the weights are put aside they are read into the memory of the processor.
    device = torch.device("cpu") if context.offload else context.device
    return LastToken(
        spec=spec,
        network=filled(found.checkpoint, context.dtype, device),
        context=context,
        rows=rows,
        labels=labels,
        padding=found.config.get("pad_token_id") if found.kind == "classifier" else None,
    )


def shared(prompts: Sequence[Asked], ids: Sequence[list[int]]) -> list[Group]:
    """Groups the texts of each prompt behind what their ids begin with. Each text keeps at least one id.

    prompts [N], with those of one prompt side by side; ids [N].
    """
    groups = []
    for _, same in groupby(range(len(ids)), key=lambda row: prompts[row]):
        rows = list(same)
        texts = [ids[row] for row in rows]
        common = commonprefix(texts)[: min(map(len, texts)) - 1]
        longest = max(LONGEST_GROUP, 2 * len(common))
        part: list[int] = []
        size = len(common)
        for row in rows:
            own = len(ids[row]) - len(common)
            if part and size + own > longest:
                groups.append(_group(common, ids, part))
                part, size = [], len(common)
            part.append(row)
            size += own
        groups.append(_group(common, ids, part))
    return groups


def _group(common: list[int], ids: Sequence[list[int]], rows: list[int]) -> Group:
    return Group(list(common), [ids[row][len(common) :] for row in rows], rows)


def _without_end(ids: list[int], padding: int) -> list[int]:
    """Returns a text without its last ids that are padding, and with its first."""
    end = len(ids)
    while end > 1 and ids[end - 1] == padding:
        end -= 1
    return ids[:end]


def text_ids(
    reader: Reader, prompts: list[Asked], responses: list[str], sampled: Sampled | None
) -> list[list[int]]:
    """Tokenises texts; takes the ids that the policy sampled where they mean the same text here."""
    ids = reader.encode(prompts, responses)["input_ids"]
    if sampled is None:
        return ids
    read: dict[str, list[int]] = {}
    tokenizer = reader.tokenizer
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        key = str(prompt)
        if key not in read:
            read[key] = tokenizer.encode(reader.written(prompt, None), add_special_tokens=False)
        own, finished = sampled.response_ids[row], sampled.finished[row]
        whole = [*sampled.prompt_ids[row], *own]
        if (
            sampled.prompt_ids[row] == read[key]
            and 0 < len(whole) <= reader.max_tokens
            and (tokenizer.eos_token_id in own[-1:]) == finished
            and tokenizer.decode(own, skip_special_tokens=True) == response
        ):
            ids[row] = whole
    return ids
