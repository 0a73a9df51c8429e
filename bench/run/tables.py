"""Tables of candidates: titles and columns that several cases share."""

from collections.abc import Callable
from typing import NamedTuple


class Table(NamedTuple):
    """A table of strings."""

    title: str
    header: list[str]
    rows: list[list[str]]


# Header -> what a candidate's row of the line shows under it.
Columns = dict[str, Callable[[dict], str]]


def candidate_table(line: dict, title: str, columns: Columns) -> Table:
    """Returns a table with a row for each candidate of a line."""
    rows = [[show(c) for show in columns.values()] for c in line["candidates"]]
    return Table(title, list(columns), rows)


def pages(line: dict) -> str:
    """Says in a title that freed memory was kept, where it was."""
    return ", freed memory kept" if line["keep_pages"] else ""


def engine_title(line: dict) -> str:
    """Returns the title of a case that samples or trains whole responses."""
    what = f"{line['rows']} responses of {line['new']} tokens to prompts of {line['prompt']}"
    if line.get("real"):
        what = f"{line['rows']} responses of at most {line['new']} tokens to {line['rows'] // 8} prompts of "
        what += "the quickstart"
    tuned = ", full fine-tuning" if line.get("full") else ""
    title = f"{line['case']}: {line['shape']}, {what}, {line['dtype']}{tuned}{pages(line)}"
    title += f"; floor (bare products) {1000 * line['floor_s']:.0f} ms"
    if "computed_s" in line:
        title += f", floor by bytes and flops {1000 * line['computed_s']:.0f} ms"
    return title


def times() -> Columns:
    """Returns the columns of name and times."""
    return {
        "": lambda c: c["name"],
        "ms, median": lambda c: f"{1000 * c['median_s']:.1f}",
        "p20 to p80": lambda c: f"{1000 * c['p20_s']:.1f} to {1000 * c['p80_s']:.1f}",
    }


def floor_shares(line: dict) -> Columns:
    """Returns the columns that compare with the floors."""
    columns: Columns = {"of the floor": lambda c: f"{100 * c['floor_share']:.1f} %"}
    if "computed_s" in line:
        columns["of that by bytes and flops"] = lambda c: f"{100 * c['computed_share']:.1f} %"
    return columns


def ratio_and_memory(line: dict, name: str = "time / ours", ours: str = "dualign") -> Columns:
    """Returns the columns of the time over that of `ours`, a token's where candidates
    differ in these, and of memory."""
    (base,) = (c["median_s"] / _tokens(line, c) for c in line["candidates"] if c["name"] == ours)
    return {
        name: lambda c: f"{c['median_s'] / _tokens(line, c) / base:.2f}",
        "extra memory, MB": lambda c: (
            "not seen" if c["extra_bytes"] is None else f"{c['extra_bytes'] / 1e6:.0f}"
        ),
    }


def token_rate(line: dict) -> Columns:
    """Returns the column of tokens a second."""
    return {"tokens/s": lambda c: f"{_tokens(line, c) / c['median_s']:.0f}"}


def _tokens(line: dict, candidate: dict) -> int:
    """Returns the tokens of a candidate's call; 1 in a case that counts none."""
    return candidate.get("tokens", line.get("tokens", 1))
