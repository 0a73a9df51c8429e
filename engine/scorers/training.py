"""Train a score head: `python -m engine.train head --data FILE.jsonl --name harm --layer 15 --out FOLDER`.

A head is a linear score of the frozen trunk's mean state over a response (`engine.scorers.scoring.Head`).
Pairs are fitted by Bradley-Terry on state differences, labels by logistic regression; both are one convex
problem, solved by Newton's method in float64, so that equal data give equal heads. States are read by the
same forward that scores responses in a run.
"""

import json
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from engine.data.prompts import check_known
from engine.errors import UserError
from engine.model import quickstart
from engine.model.decoder import Decoder
from engine.model.folder import fingerprint, load, resolve
from engine.model.packing import Group
from engine.model.tokenizer import load_tokenizer
from engine.policy.forward import frozen_forward
from engine.scorers.base import Head
from engine.scorers.head_card import card, command_line, table
from engine.scorers.head_config import HeadConfig, check
from engine.scorers.head_data import check_classes, encode, read_rows, split, unique_texts, without_shared
from engine.scorers.head_figures import evaluate
from engine.scorers.head_fit import fit


def train(config: HeadConfig, *, command: str = "") -> Head:
    """Fit a head, print its held-out figures and write it with its model card. `command` replaces the card's command line.

    Raises: UserError for a setting or a row that cannot be used.
    """
    check(config)
    name = config.name or Path(config.out).name
    rows, test = read_rows(config.data, config), read_rows(config.test, config)
    if test:
        rows, shared = without_shared(rows, test)
    else:
        rows, test = split(rows, config.seed)
        rows, shared = without_shared(rows, test)
    if shared:
        print(f"{shared} training rows removed: their texts are also in the test rows")
    check_classes(rows)

    folder = resolve(config.model) if config.model else quickstart.model_folder()
    model, tokenizer = load(folder), load_tokenizer(folder)
    if not 0 <= config.layer <= model.config.num_layers:
        raise UserError(f"--layer {config.layer}: the model has {model.config.num_layers} layers.")
    texts = unique_texts([*rows, *test])
    start = time.perf_counter()
    encoded = encode(texts, tokenizer, config, model.config.max_positions)
    for group in encoded:
        for ids, i in ((group.prompt, group.rows[0]), *zip(group.responses, group.rows, strict=True)):
            check_known(ids, model.config.vocab_size, f"--data: the text {texts[i].response[:60]!r} or its prompt")
    pooled_ND = states(model, encoded, [config.layer])[config.layer]
    print(f"{len(texts)} texts read by {config.layer} layers in {time.perf_counter() - start:.0f} s")

    at = {text: i for i, text in enumerate(texts)}
    weight_D, bias = fit(rows, pooled_ND, at, config.l2)
    head = Head(name=name, layer=config.layer, weight_D=weight_D, bias=bias, trunk=fingerprint(folder))
    figures = {
        "name": name, "layer": config.layer, "l2": config.l2, "trunk": head.trunk, "train_rows": len(rows), "test_rows": len(test),
        "removed_shared_rows": shared, "rows_by_source": dict(sorted(Counter(r.source for r in rows).items())),
        "test": evaluate(test, head(pooled_ND), at),
    }  # fmt: skip
    print(table(figures["test"]))
    out = Path(config.out)
    head.save(out)
    (out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    (out / "README.md").write_text(card(config, figures, command or command_line(config)))
    print(f"written: {out / 'head.safetensors'}, metrics.json, README.md")
    return head


def states(model: Decoder, groups: list[Group], layers: list[int]) -> dict[int, Tensor]:
    """layer -> mean states float32 [N, D] in the order of the groups' `rows` indices."""
    pooled, _ = frozen_forward(model, groups, sorted(layers), temperature=None)
    order = torch.tensor([row for group in groups for row in group.rows])
    return {layer: value[order.argsort()] for layer, value in pooled.items()}
