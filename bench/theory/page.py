"""Writes docs/theory.md from the template page.md, its pictures, and docs/theory.json."""

import json
from pathlib import Path

from rich.console import Console

from bench.theory.failures import failures
from bench.theory.pictures import draw_all
from bench.theory.tables import all_tables, escaped
from bench.theory.tasks import Results
from engine.files import write_whole

TEMPLATE = Path(__file__).parent / "page.md"


def write(results: Results, out: Path, console: Console) -> list[str]:
    """Prints the tables and writes page, pictures and results file to `out`;
    returns the statements that fail."""
    lines = [x.result for x in results["problems"]]
    tables, wrong = all_tables(results), failures(results)
    for table in tables.values():
        table.show(console)
    out.mkdir(parents=True, exist_ok=True)
    draw_all(results, out)
    parts = {name: table.markdown() for name, table in tables.items()}
    parts |= {"one-shot": one_shot_sentence(lines), "loose": loose_sentence(lines)}
    parts["failures"] = escaped("\n".join(f"- {w}" for w in wrong) or "None.")
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    write_whole(out / "theory.md", text.encode())
    contents = rounded(results_file(lines + [x.result for x in results["variants"]]))
    written = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    write_whole(out / "theory.json", f"{written}\n".encode())
    return wrong


def one_shot_sentence(lines: list[dict]) -> str:
    """Says what one-shot multipliers do where the class has a gap."""
    slacks = [x["one_shot_slack"] for x in lines if x["eps"] > 0]
    several = [slack for slack in slacks if len(slack) > 1]
    missed = sum(min(slack) < -1e-9 for slack in slacks)
    spare = sum(max(slack) > 1e-9 for slack in several)
    return (
        f"One-shot lambda misses the worst constraint in {missed} of the {len(slacks)} problems with eps "
        "above 0: the class answers more weakly than the tilt. Other constraints can end on the safe side: "
        f"{spare} of the {len(several)} with two or three constraints have one that holds with slack to "
        "spare."
    )


def loose_sentence(lines: list[dict]) -> str:
    """Says which statements no deliberate mistake turned red in any problem."""
    here = [x for x in lines if 0 < x["eps"] <= 1]
    red = {name for x in here for names in x["broken"].values() for name in names}
    loose = list(dict.fromkeys(b["name"] for x in here for b in x["bounds"] if b["name"] not in red))
    named = escaped("; ".join(loose)) or "none"
    return f"Statements that none of these turns red, as B is too wide: {named}."


def results_file(lines: list[dict]) -> dict:
    """Returns the results file.

    statements: [name, form] each.
    problems: constants and `sides`: in the order of the statements [left, right], or null where
      a statement does not apply.
    """
    statements = list(dict.fromkeys((b["name"], b["form"]) for x in lines for b in x["bounds"]))
    problems = []
    for x in lines:
        sides = {(b["name"], b["form"]): [b["left"], b["right"]] for b in x["bounds"]}
        constants = {k: v for k, v in x.items() if k not in ("bounds", "broken")}
        problems.append(constants | {"sides": [sides.get(s) for s in statements]})
    return {"statements": statements, "problems": problems}


def rounded(x):
    """Rounds all numbers to four significant digits: enough for a ratio, and equal on machines
    that differ in the last bits."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x
