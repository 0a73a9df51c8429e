"""Files of scores, and the pairs that are made from them."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.tables import read_file
from engine.errors import UserError
from engine.records import utility_of_cost

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Table:
    """The scores of a file, in its units; larger is better (costs are negated)."""

    prompts: list[str | int]  # [P], in the order of their first rows
    responses: list[list[str]] | None  # [P][G]
    reward_PG: Tensor  # float64
    utility_PGJ: Tensor  # float64
    names: list[str]  # [J]


def read_scores(file: str, utility: tuple[str, ...], cost: tuple[str, ...], *, texts: bool) -> Table:
    """The table of a scores file. `texts` asks for prompts and responses as text.

    Raises: UserError naming the file and line of a missing column, a value that is no finite number, or a prompt whose number of
    responses differs.
    """
    rows = read_file(file, SUFFIXES)
    if not rows:
        raise UserError(f"{file}: no rows in it; give one row per response.")
    if not utility and not cost:
        utility = _further_columns(*rows[0])
    names = [*utility, *cost]
    grouped: dict[str | int, list[tuple[str, dict]]] = {}
    for place, row in rows:
        prompt = _cell(row, "prompt", place)
        if not isinstance(prompt, str | int) or (texts and not isinstance(prompt, str)):
            wanted = "text" if texts else "text or a whole number"
            raise UserError(f"{place}: column 'prompt' holds a {type(prompt).__name__}; give {wanted}.")
        grouped.setdefault(prompt, []).append((place, row))

    counts = Counter(len(group) for group in grouped.values())
    G, alike = counts.most_common(1)[0]
    for prompt, group in grouped.items():
        if len(group) != G:
            raise UserError(
                f"{group[0][0]}: prompt {str(prompt)[:60]!r} has {len(group)} response(s), but {alike} prompt(s) have {G}; give all the "
                "same number."
            )
    if G < 2:
        raise UserError(f"{file}: one response per prompt; the dual weighs a prompt's responses against each other, so give at least 2.")
    if len(grouped) < 2:
        raise UserError(f"{file}: one prompt; an interval over prompts needs at least 2.")

    def column(name: str) -> Tensor:
        values = [[_finite_number(row, name, place) for place, row in group] for group in grouped.values()]
        return torch.tensor(values, dtype=torch.float64)

    def response(place: str, row: dict) -> str:
        text = _cell(row, "response", place)
        if not isinstance(text, str):
            raise UserError(f"{place}: column 'response' holds a {type(text).__name__}; give text.")
        return text

    columns = [column(name) for name in utility] + [utility_of_cost(column(name)) for name in cost]
    return Table(
        prompts=list(grouped),
        responses=[[response(*pair) for pair in group] for group in grouped.values()] if texts else None,
        reward_PG=column("reward"),
        utility_PGJ=torch.stack(columns, dim=2),
        names=names,
    )


def _further_columns(place: str, row: dict) -> tuple[str, ...]:
    """The columns with numbers beside prompt, response and reward."""
    further = tuple(name for name, value in row.items() if name not in ("prompt", "response", "reward") and isinstance(value, int | float))
    if not further:
        raise UserError(f"{place}: no column of a utility or cost; columns found: {listed(row)}.")
    for name in further:
        if "cost" in name.lower():
            raise UserError(f"{place}: column {name!r} may be a cost; write --cost {name}, or --utility {name} if larger is better.")
    return further


def _cell(row: dict, name: str, place: str) -> object:
    if name not in row:
        raise UserError(f"{place}: no column {name!r}; columns found: {listed(row)}.")
    return row[name]


def _finite_number(row: dict, name: str, place: str) -> float:
    value = _cell(row, name, place)
    if not isinstance(value, int | float):
        raise UserError(f"{place}: column {name!r} holds {str(value)[:60]!r}; give a number.")
    if isinstance(value, int) and abs(value) > 2**1000 or not math.isfinite(value):
        raise UserError(f"{place}: column {name!r} is {str(value)[:20]}; it must be finite: repair the score, or drop the prompt.")
    return float(value)


def listed(names) -> str:
    return ", ".join(map(str, names)) or "none"


def preference_pairs(table: Table, score_PG: Tensor, seed: int) -> tuple[list[dict], int]:
    """(rows, number of prompts left out): the responses with the highest and the lowest s = r + lambda . g of each prompt, the chosen one
    drawn by Bradley-Terry: P(highest) = sigmoid(s_high - s_low), as in arXiv 2505.19387, Algorithm 2.

    DPO with the same beta then ends at the tilt exp(s / beta) of the reference. Were the highest always chosen, its loss would have no
    finite minimiser. A row has the text columns prompt, chosen and rejected, as TRL's DPOTrainer reads them (OpenRLHF with --prompt_key
    prompt), and score_chosen and score_rejected. Prompts whose two responses have one score or one text carry no preference.
    """
    rows = []
    drawn_P = torch.rand(len(score_PG), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    for p, order in enumerate(score_PG.argsort(dim=1, stable=True).tolist()):
        low, high = order[0], order[-1]
        rise = float(score_PG[p, high] - score_PG[p, low])
        if rise > 0 and table.responses[p][high] != table.responses[p][low]:
            chosen, rejected = (high, low) if drawn_P[p] < 1 / (1 + math.exp(-rise)) else (low, high)
            rows.append({
                "prompt": table.prompts[p], "chosen": table.responses[p][chosen], "rejected": table.responses[p][rejected],
                "score_chosen": float(score_PG[p, chosen]), "score_rejected": float(score_PG[p, rejected]),
            })  # fmt: skip
    return rows, len(table.prompts) - len(rows)
