"""The parts that all pages share: the document with its style, tables and cells."""

from collections.abc import Sequence
from html import escape

from engine.intervals import number

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
.verdict { border-left: .5rem solid; padding: .6rem 1rem; overflow-wrap: anywhere; }
.verdict p { margin: .3rem 0; }
.met { background: #e3f4e8; border-color: #1a7f37; } .not-met { background: #fde7e7; border-color: #b42318; }
.not-resolved { background: #fff3d6; border-color: #b97a00; } .none { background: #eee; border-color: #888; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right; white-space: nowrap; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.sample { border-top: 1px solid #ccc; padding: .6rem 0; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 600; } .small { color: #555; font-size: .85rem; }
@media (max-width: 40rem) { .sides { grid-template-columns: 1fr; } }
"""


SAMPLES_NOTE = (
    "<p class='small'>The first of each kind, not chosen; they may be offensive or wrong. "
    "Larger scores are better.</p>"
)


def document(title: str, body: str, style: str = "") -> str:
    """Returns a whole page that forbids scripts and loads from elsewhere; title and body are HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}{style}</style></head><body>
{body}
</body></html>
"""


def verdict_box(word: str, lines: Sequence[str]) -> str:
    """Returns a box in the colour of a word with lines of text, those about the constraints in bold."""
    said = [escape(line) for line in lines]
    said = [f"<strong>{x}</strong>" if x.startswith(("constraint ", "verdict: ")) else x for x in said]
    paragraphs = "".join(f"<p>{line}</p>" for line in said)
    return f'<div class="verdict {escape(word.replace(" ", "-"))}">{paragraphs}</div>'


def table(head: list[str], body: list[list[str]], kind: str = "") -> str:
    """Returns a table of escaped texts; `kind` is its class in the style, if any."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n" for cells in body
    )
    of_kind = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{of_kind}><tr>{top}</tr>\n{rows}</table></div>'


def item(row: dict, key: str, j: int) -> float | None:
    """Returns the j-th number under a key of a row, None where the row has none."""
    value = row.get(key)
    return value[j] if value is not None and j < len(value) else None


def cell(value: float | None, digits: int = 2) -> str:
    """Prints a number with fixed digits, "-" where there is none."""
    return "-" if value is None else number(value, digits)


def with_se(value: float | None, se: float | None) -> str:
    """Prints a number with its standard error, where it has one."""
    return cell(value) if se is None else f"{cell(value)} \u00b1 {cell(se)}"
