"""Files of scores, and the preference pairs that are made from them.

A file is jsonl or parquet with one row per response: `prompt` (text or a whole number), `reward`, one column
for each utility or cost, and `response` where pairs are exported. All prompts have the same number of
responses; the rows of a prompt need not stand together.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.bounds import LARGEST_SCORE
from engine.data.formats import PlacedRow
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
    """Reads a scores file.

    utility, cost: names of its columns. texts: whether prompts and responses are wanted as text.
    Raises: UserError naming the file and line of a missing column, a value that is not a finite number, or a
    prompt whose number of responses differs.
    """
    rows = list(read_file(file, SUFFIXES))
    if not rows:
        raise UserError(f"{file}: no rows in it; give one row per response.")
    if not utility and not cost:
        utility = _further_columns(rows)
    groups = _by_prompt(rows, texts)
    _check_counts(file, groups)

    def column(name: str) -> Tensor:
        values = [[_finite_number(row, name, place) for place, row in group] for group in groups.values()]
        return torch.tensor(values, dtype=torch.float64)

    columns = [column(name) for name in utility] + [utility_of_cost(column(name)) for name in cost]
    return Table(
        prompts=list(groups),
        responses=[[_response(*row) for row in group] for group in groups.values()] if texts else None,
        reward_PG=column("reward"),
        utility_PGJ=torch.stack(columns, dim=2),
        names=[*utility, *cost],
    )


def _by_prompt(rows: list[PlacedRow], texts: bool) -> dict[str | int, list[PlacedRow]]:
    groups: dict[str | int, list[PlacedRow]] = {}
    for place, row in rows:
        prompt = _cell(row, "prompt", place)
        # True and False are whole numbers to Python.
        if not isinstance(prompt, str if texts else str | int) or isinstance(prompt, bool):
            wanted = "text" if texts else "text or a whole number"
            raise UserError(f"{place}: column 'prompt' holds a {type(prompt).__name__}; give {wanted}.")
        groups.setdefault(prompt, []).append((place, row))
    return groups


def _check_counts(file: str, groups: dict[str | int, list[PlacedRow]]) -> None:
    G, alike = Counter(len(group) for group in groups.values()).most_common(1)[0]
    for prompt, group in groups.items():
        if len(group) != G:
            place = group[0][0]
            raise UserError(
                f"{place}: prompt {str(prompt)[:60]!r} has {len(group)} response(s), "
                f"but {alike} prompt(s) have {G}; give all the same number."
            )
    if G < 2:
        raise UserError(
            f"{file}: one response per prompt; the dual weighs a prompt's responses against each other, "
            "so give at least 2."
        )
    if len(groups) < 2:
        raise UserError(f"{file}: one prompt; an interval over prompts needs at least 2.")


def _further_columns(rows: list[PlacedRow]) -> tuple[str, ...]:
    """Returns the columns of the first row that hold a number in any row, beside prompt, response and reward.

    Raises: UserError where there is none, or where one may be a cost.
    """
    place, first = rows[0]
    known = ("prompt", "response", "reward")
    numbers = {name for _, row in rows for name, value in row.items() if isinstance(value, int | float)}
    further = tuple(name for name in first if name in numbers and name not in known)
    if not further:
        raise UserError(f"{place}: no column of a utility or cost; columns found: {joined(first)}.")
    for name in further:
        if "cost" in name.lower():
            raise UserError(
                f"{place}: column {name!r} may be a cost; "
                f"write --cost {name}, or --utility {name} if larger is better."
            )
    return further


def _cell(row: dict, name: str, place: str) -> object:
    if name not in row:
        raise UserError(f"{place}: no column {name!r}; columns found: {joined(row)}.")
    return row[name]


def _finite_number(row: dict, name: str, place: str) -> float:
    value = _cell(row, name, place)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{place}: column {name!r} holds {str(value)[:60]!r}; give a number, or name the columns to read "
            "with --utility and --cost."
        )
    if not abs(value) <= LARGEST_SCORE:
        raise UserError(
            f"{place}: column {name!r} is {str(value)[:20]}; it must be finite, and at most "
            f"{LARGEST_SCORE:g} in size: repair the score, or drop the prompt."
        )
    return float(value)


def _response(place: str, row: dict) -> str:
    text = _cell(row, "response", place)
    if not isinstance(text, str):
        raise UserError(f"{place}: column 'response' holds a {type(text).__name__}; give text.")
    return text


def joined(names: Iterable) -> str:
    """Writes names for a message: a, b, c, or none."""
    return ", ".join(map(str, names)) or "none"


def preference_pairs(table: Table, score_PG: Tensor, seed: int) -> tuple[list[dict], int]:
    """Pairs the responses of each prompt with the highest and the lowest score s = r + lambda . g.

    The chosen one is drawn by Bradley-Terry, P(highest) = sigmoid(s_high - s_low), as in arXiv 2505.19387,
    Algorithm 2. DPO with the same beta then ends at the tilt exp(s / beta) of the reference. Were the highest
    always chosen, its loss would have no finite minimiser.

    A row has the text columns prompt, chosen and rejected, as TRL's DPOTrainer reads them (OpenRLHF with
    --prompt_key prompt), and score_chosen and score_rejected. Prompts whose two responses have one score or
    one text carry no preference and are left out. Returns the rows and the number of prompts left out.
    """
    rows = []
    generator = torch.Generator().manual_seed(seed)
    uniform_P = torch.rand(len(score_PG), generator=generator, dtype=torch.float64).tolist()
    for p, order in enumerate(score_PG.argsort(dim=1, stable=True).tolist()):
        low, high = order[0], order[-1]
        rise = float(score_PG[p, high] - score_PG[p, low])
        responses = table.responses[p]
        if rise > 0 and responses[high] != responses[low]:
            chosen, rejected = (high, low) if uniform_P[p] < 1 / (1 + math.exp(-rise)) else (low, high)
            rows.append(
                {
                    "prompt": table.prompts[p],
                    "chosen": responses[chosen],
                    "rejected": responses[rejected],
                    "score_chosen": float(score_PG[p, chosen]),
                    "score_rejected": float(score_PG[p, rejected]),
                }
            )
    return rows, len(table.prompts) - len(rows)
