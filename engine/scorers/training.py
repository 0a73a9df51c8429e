"""Train a score head: `python -m engine.train head --data FILE.jsonl --name harm --layer 15 --out FOLDER`.

A head is a linear score of the frozen trunk's mean state over a response (`engine.scorers.base.Head`). Pairs
are fitted by Bradley-Terry on state differences, labels by logistic regression; both are one convex problem,
solved by Newton's method in float64, so that equal data give equal heads. States are read by the same forward
that scores responses in a run.
"""

import json
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from engine import quickstart
from engine.config.template import template_kwargs
from engine.data.prompts import TextLimits
from engine.data.reading import Rules
from engine.data.templates import check_kwargs, remarks, use_template
from engine.errors import UserError
from engine.files import whole_files, write_whole
from engine.model.decoder import Decoder
from engine.model.folder import fingerprint, load, resolve
from engine.model.packing import Group
from engine.model.tokenizer import load_tokenizer
from engine.policy.forward import frozen_forward
from engine.ranks import ALONE, Ranks
from engine.scorers.base import Head
from engine.scorers.head_card import command_line, figures_table, model_card
from engine.scorers.head_config import HeadConfig, check
from engine.scorers.head_data import (
    check_classes,
    encode,
    hold_out,
    read_head_rows,
    unique_texts,
    without_equal_pairs,
    without_shared_texts,
    without_unusable_prompts,
)
from engine.scorers.head_figures import heldout_figures
from engine.scorers.head_fit import fit_head

FILES = ("head.safetensors", "metrics.json", "README.md")


def train(config: HeadConfig, *, command: str = "", ranks: Ranks = ALONE) -> Head:
    """Fits a head, prints its held-out figures and writes it with its model card.

    command: the command line that the card shows; the default is made from `config`. ranks: share out the
    reading of the texts; of several, rank 0 alone fits, prints and writes.
    Raises: UserError for a setting or a row that cannot be used.
    """
    check(config)
    ranks.check_alike({f"--{f.name}": str(getattr(config, f.name)) for f in fields(config)})
    out = Path(config.out)
    with ranks.only_first(whole_files(out, FILES)) as folder:
        head = _train(config, folder, command or command_line(config), ranks)
    if ranks.is_first:
        print(f"written: {out / 'head.safetensors'}, metrics.json, README.md")
    return head


def _train(config: HeadConfig, out: Path | None, command: str, ranks: Ranks) -> Head:
    def say(line: str) -> None:
        if ranks.is_first:
            print(line)

    rules = Rules(
        prompt_column=config.prompt_column, response_columns=config.response_columns, strict=config.strict
    )
    (rows, said), (test, more) = (
        read_head_rows(files, config.loss, rules, config.label_column) for files in (config.data, config.test)
    )
    for line in [*said, *more]:
        say(line)
    if not test:
        rows, test = hold_out(rows, config.seed)
    n_rows = len(rows)
    rows = without_shared_texts(rows, test)
    removed = n_rows - len(rows)
    if removed:
        say(f"{removed} training rows removed: their texts are also in the test rows")
    check_classes(rows, test)

    folder = resolve(config.model) if config.model else quickstart.model_folder()
    model, tokenizer = load(folder), load_tokenizer(folder)
    kwargs, said = template_kwargs(config.chat_template_kwargs), []
    if config.template:
        _, said = use_template(tokenizer, config.template, kwargs)
    check_kwargs(tokenizer, kwargs)
    if not 0 <= config.layer <= model.config.num_layers:
        layers = model.config.num_layers
        raise UserError(f"--layer {config.layer}: the model has {layers} layers; give at most that many.")
    limits = TextLimits(
        system=config.system,
        max_positions=model.config.max_positions,
        max_new_tokens=config.max_new_tokens,
        vocab_size=model.config.vocab_size,
        template_kwargs=kwargs,
    )
    if not config.strict:
        (rows, left_out), (test, more) = (
            without_unusable_prompts(part, tokenizer, limits) for part in (rows, test)
        )
        for reason, count in sorted((left_out + more).items()):
            say(f"{count} rows removed: {reason}")
        check_classes(rows, test)
    texts = unique_texts([*rows, *test])
    start = time.perf_counter()
    index, groups = {text: i for i, text in enumerate(texts)}, encode(texts, tokenizer, limits)
    said += remarks(tokenizer, groups[0].prompt, kwargs, has_system=bool(config.system))
    for line in said:
        say(f"note: {line}")
    n_pairs = len(rows) + len(test)
    rows, test = (without_equal_pairs(part, index, groups) for part in (rows, test))
    if equal := n_pairs - len(rows) - len(test):
        say(f"{equal} pairs removed: cut at --max-new-tokens {config.max_new_tokens} they are equal")
        check_classes(rows, test)
    pooled_ND = pooled_states(model, groups, config.layer, ranks)
    say(f"{len(texts)} texts read by {config.layer} layers in {time.perf_counter() - start:.0f} s")

    weight_D, bias = ranks.first(lambda: fit_head(rows, pooled_ND, index, config.l2))
    name = config.name or Path(config.out).name
    head = Head(name=name, layer=config.layer, weight_D=weight_D, bias=bias, trunk=fingerprint(folder))
    figures = {
        "name": name,
        "layer": config.layer,
        "l2": config.l2,
        "trunk": head.trunk,
        "train_rows": len(rows),
        "test_rows": len(test),
        "removed_shared_rows": removed,
        "rows_by_source": dict(sorted(Counter(row.source for row in rows).items())),
        "test": heldout_figures(test, head(pooled_ND), index),
    }
    say(figures_table(figures["test"]))

    def write() -> None:
        head.save(out)
        write_whole(out / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
        write_whole(out / "README.md", model_card(config, figures, command).encode())

    ranks.first(write)
    return head


def pooled_states(model: Decoder, groups: list[Group], layer: int, ranks: Ranks = ALONE) -> Tensor:
    """Computes the mean state of each response after `layer` layers, each rank those of its groups:
    float32 [N, D], in the order of `rows`."""
    own = [groups[i] for i in ranks.share(len(groups))]
    parts = ranks.of_shares(frozen_forward(model, own, [layer], temperature=None)[0][layer] if own else None)
    order = torch.tensor([row for group in groups for row in group.rows])
    return torch.cat([part for part in parts if part is not None])[order.argsort()]
