"""Files with two responses to each prompt: preferences of people (arXiv 2405.19544, the set of Algorithm 2), or pairs to learn from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.data import tables
from engine.data.prompts import chat_ids, check_known
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.records import Prompts, Rollouts

# A label of a file: sigmoid of twice this is 1.
SURE = 1e3


@dataclass(frozen=True, kw_only=True)
class ResponsePairs:
    """The rows of a file. A prompt may stand in several, so that its key is its row's number."""

    prompts: Prompts
    rollouts: Rollouts  # n = 2, without log-probs
    texts: list[str]
    label_PGO: Tensor  # float64 [P, 2, O]: scores that give the labels of the O columns asked for


def read_response_pairs(source: str, columns: list[str], config: RunConfig, tokenizer, shape: ModelConfig) -> ResponsePairs:
    """Read a jsonl, csv or parquet file with the columns prompt, response_0, response_1 (or chosen, rejected), perhaps kind, and `columns`,
    each 0 or 1: the response that is better in it. Responses are cut at --max-new-tokens.

    Raises: UserError naming the row and the column: one that is missing, a prompt or response that is no text, a label that is neither.
    """
    limit = shape.max_positions - config.max_new_tokens
    prompts, tokens, texts, labels = [], [], [], []
    for place, row in tables.read_rows(source):
        pair = ("chosen", "rejected") if not columns and "chosen" in row else ("response_0", "response_1")
        missing = [c for c in ("prompt", *pair, *columns) if c not in row]
        if missing:
            raise UserError(f"{place}: no column {missing[0]!r}; wanted are {', '.join(('prompt', *pair, *columns))}.")
        for name in ("prompt", *pair):
            if not isinstance(row[name], str) or not (row[name].strip() or name in pair):
                raise UserError(f"{place}: {name} is {row[name]!r:.60}; give text, or remove the row.")
        bad = [name for name in columns if str(row[name]) not in ("0", "1")]
        if bad:
            raise UserError(f"{place}: {bad[0]} is {row[bad[0]]!r}; give 0 or 1, the response that is better in it.")
        ids = chat_ids([{"role": "user", "content": row["prompt"]}], tokenizer, config.system, place)
        if len(ids) > limit:
            raise UserError(f"{place}: the prompt has {len(ids)} tokens, the limit is {limit}; shorten or remove it.")
        check_known(ids, shape.vocab_size, place)
        prompts.append((row["prompt"], str(row.get("kind") or ""), ids))
        for name in pair:
            answer = tokenizer(row[name], add_special_tokens=False)["input_ids"]
            check_known(answer, shape.vocab_size, place)
            tokens.append((answer + [tokenizer.eos_token_id])[: config.max_new_tokens])
            texts.append(tokenizer.decode(tokens[-1], skip_special_tokens=True))
        labels.append([[SURE if int(row[name]) == i else -SURE for name in columns] for i in (0, 1)])
    if not prompts:
        raise UserError(f"{source}: no rows in it; give at least one.")
    text, kind, token_ids = (list(column) for column in zip(*prompts, strict=True))
    length = torch.tensor([len(x) for x in tokens])
    padded = torch.zeros(len(tokens), config.max_new_tokens, dtype=torch.int64)
    for i, answer in enumerate(tokens):
        padded[i, : len(answer)] = torch.tensor(answer)
    none = torch.zeros(padded.shape)
    return ResponsePairs(
        prompts=Prompts(text=text, kind=kind, token_ids=token_ids, key_P=torch.arange(len(text))),
        rollouts=Rollouts(
            n=2,
            tokens=padded,
            length=length,
            finished=length < config.max_new_tokens,
            logprob=none,
            model_logprob=none,
            near_tie=none.bool(),
        ),
        texts=texts,
        label_PGO=torch.tensor(labels, dtype=torch.float64).view(len(text), 2, len(columns)),
    )  # fmt: skip
