"""Lines of bench/results.jsonl as tables, and bench/RESULTS.md, which is written from all of them."""

import json
from pathlib import Path

from bench.run import growth
from bench.run.cases import CASES
from bench.run.tables import Table
from engine.files import append_line, write_whole
from engine.policy.forward import LogprobGap
from engine.report.drawing import png

HERE = Path(__file__).parent.parent
HEAD = (
    "# Results\n\n"
    "Written by `python -m bench.run`; do not edit. Only figures of one table are comparable. Extra memory "
    "is the most that torch held\nat once in a call, beyond what was there before and what it returns; what "
    "other libraries allocate themselves is not in it.\n"
)
# The latest line of each combination of these is shown.
KEYS = (
    "case", "shape", "rows", "real", "prompt", "new", "dtype", "frozen", "full", "sampled_at", "keep_pages",
    "device",
)  # fmt: skip


def table_of(line: dict) -> Table:
    """Returns the table of one line; a line of case "table" holds it ready, with numbers of any length."""
    if line["case"] == "table":
        rows = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in line["table"]]
        return Table(line["shape"], line["header"], rows)
    return CASES[line["case"]].table(line)


def notes_of(line: dict) -> list[str]:
    """Returns the sentences that stand under the table."""
    if line["case"] == "table":
        return line["notes"]
    notes = [f"{name} did not run: {why}" for name, why in line.get("not_run", {}).items()]
    if "computed_s" in line:
        parts = ", ".join(f"{name} {1000 * s:.3g}" for name, s in line["computed_parts_s"].items())
        rates = f"{line['bytes_per_s'] / 1e9:.0f} GB/s and {line['flops_per_s'] / 1e12:.3g} Tflop/s"
        notes.append(f"Floor by bytes and flops, ms: {parts}; at {rates}, measured in the same rounds.")
    if "logprob_gap" in line:
        notes.append(f"Here {LogprobGap(**line['logprob_gap'])}.")
    if line.get("parting"):
        share, tokens = line["parting"]
        after = f", after {tokens:.0f} equal tokens on average" if share else ""
        differ = f"{100 * share:.0f} % of the responses differ from those sampled one prompt at a time"
        notes.append(f"{differ}{after}.")
    return notes


def add(line: dict) -> None:
    """Adds a line to results.jsonl, and writes RESULTS.md and the line's picture anew."""
    append_line(HERE / "results.jsonl", json.dumps(line, sort_keys=True))
    write_results(read_lines())
    if line["case"] == "growth":
        write_whole(HERE / "growth.png", png(lambda: growth.draw(line["points"])))


def add_new(lines: list[str]) -> int:
    """Adds lines of JSON that results.jsonl lacks, writes RESULTS.md anew, and returns how many were new."""
    path = HERE / "results.jsonl"
    known = path.read_text(encoding="utf-8").splitlines()
    new = [line for line in lines if line not in set(known)]
    write_whole(path, "".join(f"{line}\n" for line in known + new).encode())
    write_results(read_lines())
    return len(new)


def read_lines() -> list[dict]:
    """Reads results.jsonl."""
    text = (HERE / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_results(lines: list[dict]) -> None:
    """Writes bench/RESULTS.md from all lines, the latest of each case and shape."""
    latest = {tuple(x.get(k) or None for k in KEYS): x for x in lines}
    text = [HEAD]
    for line in latest.values():
        title, header, rows = table_of(line)
        text += [f"## {title}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        text += [f"| {' | '.join(row)} |" for row in rows]
        if line["case"] == "growth":
            text += ["", "![Time against size](growth.png)"]
        for note in notes_of(line):
            text += ["", note]
        text += ["", _origin(line), ""]
    write_whole(HERE / "RESULTS.md", "\n".join(text).encode())


def _origin(line: dict) -> str:
    """Says on what machine and versions a line was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
    driver = f", driver {line['driver']}" if line["driver"] else ""
    machine = f"{line['device']}, {line['threads']} threads{driver}"
    return f"{machine}, {versions}, commit {line['commit']}, {line['date']}."
