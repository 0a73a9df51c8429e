"""The tables of docs/theory.md, made from the outcomes of the tasks."""

import math
from collections.abc import Iterable
from itertools import product

import numpy as np

from bench.grid import Grid
from bench.theory.bounds import Bound
from bench.theory.facts import ROUNDING
from bench.theory.labels import FORMS, SOURCE_DRAWS, SOURCES
from bench.theory.tasks import VARIANTS, Outcome, Results

# The kinds of updates that minimise a label form over the population -> the form.
POPULATION = {
    "soft": "Bradley-Terry, soft",
    "regression": "pairwise regression",
    "listwise": "listwise",
    "single": "single response (DRO)",
}
END = "|slack| / |lambda - lambda*_p| / value - P_p* / eps_app"


def all_tables(results: Results) -> dict[str, Grid]:
    """Returns the tables by their place in the page."""
    lines = [x.result for x in results["problems"]]
    runs = results["ends"]
    few = "16 draws a prompt, which also measure the slack"
    return {
        "problems": problems_table(lines),
        "bounds": bounds_table(lines),
        "scaled": scaled_table(results["scaled"]),
        "broken": broken_table(lines, results["flipped"][0].result),
        "variants": variants_table(results["variants"]),
        "no gap": no_gap_table(results["no_gap"]),
        "six": six_table(results["six"]),
        "exact": ends_table(runs, "exact", "Exact maximiser"),
        "exact, J 3": ends_table(runs, "exact", "Exact maximiser, J = 3", J=3),
        "samples": ends_table(runs, "samples", f"Regression on {few}"),
        "drawn": ends_table(runs, "drawn", f"Labels drawn for {few}"),
        "forms": forms_table(runs),
        "algorithms by form": algorithms_by_form_table(runs),
        "labels": labels_table(results["labels"]),
        "sources": sources_table(results["sources"]),
        "two ends": two_ends_table(results["two_ends"]),
        "standardising": standardising_table(results["standardising"]),
    }


def escaped(text: str) -> str:
    """Escapes bars, which end a cell in Markdown."""
    return text.replace("|", "\\|")


def med(values: Iterable[float]) -> float:
    """Returns the median."""
    return float(np.median(list(values)))


def number(x: float) -> str:
    """Writes a number short, with a sign where it is below 0; nan is left out."""
    if math.isnan(x):
        return ""
    return "0" if x == 0 else f"{x:.3g}" if 1e-2 <= abs(x) < 1e4 else f"{x:.0e}"


def medians(rows: Iterable[Iterable[float]]) -> list[str]:
    """Writes the median of each column."""
    return [number(med(column)) for column in zip(*rows, strict=True)]


def count(values: Iterable[bool]) -> str:
    """Writes how many of the values hold."""
    values = list(values)
    return f"{sum(values)} of {len(values)}"


def problems_table(lines: list[dict]) -> Grid:
    """Describes the problems by J and eps."""
    rows = []
    for J, eps in sorted({(x["J"], x["eps"]) for x in lines}):
        here = [x for x in lines if (x["J"], x["eps"]) == (J, eps)]
        one_shot = [min(x["one_shot_slack"]) for x in here]
        rows.append(
            [
                f"{J}",
                f"{eps:g}",
                number(med(x["nu"] for x in here)),
                count(all(x["assumptions"][a] for a in ("A1", "A2", "A5")) for x in here),
                count(x["assumptions"]["A4"] for x in here),
                number(med(x["P*"] - x["D_p*"] for x in here)),
                number(max(max(0.0, x["D_p*"] - x["P_p*"]) for x in here)),
                f"{sum(x['kink'] for x in here)}",
                f"{sum(x['maxima'] > 1 for x in here)}",
                number(med(np.linalg.norm(np.subtract(x["lambda*_p"], x["lambda*"])) for x in here)),
                count(x["reached"] for x in here),
                number(max(x["caid_off"][1] for x in here)),
                f"{number(med(one_shot))} ({count(x >= -1e-9 for x in one_shot)})",
            ]
        )
    header = [
        "J",
        "eps",
        "nu",
        "A1, A2, A5 hold",
        "A4 (A6, A7) hold",
        "P* - D_p*",
        "largest D_p* - P_p*",
        "kinks of D_p",
        "several maxima",
        "\\|lambda*_p - lambda*\\|",
        "CAID at lambda*_p after 24 iterations",
        "largest slack that CAID misses 0 by there",
        "one-shot slack, worst constraint (met by)",
    ]
    return Grid("The problems, medians over seeds", header, rows)


def bounds_table(lines: list[dict]) -> Grid:
    """Shows left over right of every bound, by eps."""
    shown = [eps for eps in (0.1, 0.3, 1.0, 3.0) if any(x["eps"] == eps for x in lines)]
    by_statement: dict[tuple[str, str], list[tuple[float, dict]]] = {}
    for x in lines:
        for b in x["bounds"]:
            by_statement.setdefault((b["name"], b["form"]), []).append((x["eps"], b))

    rows = []
    for (name, form), values in by_statement.items():
        ratios = [(eps, Bound(name, form, b["left"], b["right"]).ratio) for eps, b in values]
        ratios = [(eps, ratio) for eps, ratio in ratios if not math.isnan(ratio)]
        row = [escaped(name), form, count(b["holds"] for _, b in values)]
        for eps in shown:
            here = [ratio for e, ratio in ratios if e == eps]
            row.append(number(med(here)) if here else "")
        rows.append([*row, number(max(ratio for _, ratio in ratios)) if ratios else ""])
    by_eps = [f"left / right, eps {eps:g}" for eps in shown]
    header = ["statement", "form", "holds", *by_eps, "largest left / right"]
    return Grid("Left over right of every bound, medians over J and seeds", header, rows)


def scaled_table(outcomes: list[Outcome]) -> Grid:
    """Lists the statements that fail in other units."""
    rows = []
    for scale in sorted({x.asked.scale for x in outcomes}):
        here = [x.result for x in outcomes if x.asked.scale == scale]
        wrong: dict[str, list[float]] = {}
        for x in here:
            for b in x["bounds"]:
                # Rounding is relative to the utilities' unit.
                if b["left"] > b["right"] + ROUNDING * max(1, scale):
                    ratio = b["left"] / max(b["right"], 1e-300)
                    wrong.setdefault(escaped(f"{b['name']} ({b['form']})"), []).append(ratio)
        failing = [
            [f"{scale:g}", name, f"{len(r)} of {len(here)}", number(med(r))] for name, r in wrong.items()
        ]
        rows += failing or [[f"{scale:g}", "none", "", ""]]
    header = ["utilities and b times", "statement", "fails in", "left / right"]
    return Grid("Statements that fail when the utilities' unit is changed", header, rows)


def broken_table(lines: list[dict], flipped: tuple[float, float]) -> Grid:
    """Shows which statements each deliberate mistake turns red."""
    rows = []
    here = [x for x in lines if 0 < x["eps"] <= 1]
    for mistake in here[0]["broken"] if here else []:
        red = [x["broken"][mistake] for x in here]
        names = [name for some in red for name in some]
        common = sorted(set(names), key=lambda name: (-names.count(name), name))[:3]
        rows.append([mistake, count(bool(some) for some in red), escaped("; ".join(common))])
    became = f"slack of CAID {number(flipped[0])} becomes {number(flipped[1])}"
    rows.append(["the world returns the slack with the wrong sign", "1 of 1", became])
    return Grid("Broken on purpose", ["what is wrong", "turns red in", "for example"], rows)


def six_table(outcomes: list[Outcome]) -> Grid:
    """Shows the slack that CAID leaves after six dual steps."""
    rows = []
    for J, eps in sorted({(x.asked.J, x.asked.eps) for x in outcomes}):
        here = [x.result for x in outcomes if (x.asked.J, x.asked.eps) == (J, eps)]
        cells = [f"{number(max(r[k] for r in here))} ({count(r[k] < 1e-4 for r in here)})" for k in here[0]]
        rows.append([f"{J}", f"{eps:g}", *cells])
    title = "Largest slack of CAID after six dual steps (seeds below 1e-4)"
    return Grid(title, ["J", "eps", *outcomes[0].result], rows)


def no_gap_table(outcomes: list[Outcome]) -> Grid:
    """Shows how fast each algorithm converges where nu is 0."""
    Js = sorted({x.asked.J for x in outcomes})
    rows = []
    for name, start, iterations in outcomes[0].result:
        row = [read_as(name), start, f"{iterations}"]
        for J in Js:
            here = [x.result[name, start, iterations] for x in outcomes if x.asked.J == J]
            needed = [x.needed for x in here if x.needed is not None]
            most = f" in {max(needed)}" if needed else ""
            row.append(f"{len(needed)} of {len(here)}{most}; {number(max(x.error for x in here))}")
        rows.append(row)
    title = (
        "nu = 0: runs whose errors of lambda and slack fall below 1e-6, iterations they need; largest error "
        "at the end"
    )
    return Grid(title, ["algorithm", "start", "iterations", *(f"J {J}" for J in Js)], rows)


def read_as(name: str) -> str:
    """Names an algorithm in a row: of four papers only abstracts were at hand, so these are our reading."""
    return f"our reading of {name}" if name in ("C-DPO", "PD-DPO", "OPD", "RePO") else name


def end_cell(outcomes: list[Outcome], key: tuple[str, str], **asked) -> str:
    """Writes the medians of the ends of one algorithm and start, over the outcomes that were
    asked for with these arguments."""
    here = [x.result[key].shown for x in outcomes if asked.items() <= vars(x.asked).items()]
    return " / ".join(medians(here))


def epses_of(outcomes: list[Outcome]) -> list[float]:
    """Lists the eps of the outcomes."""
    return sorted({x.asked.eps for x in outcomes})


def ends_table(outcomes: list[Outcome], kind: str, title: str, J: int = 1) -> Grid:
    """Shows where every algorithm ends with one kind of update."""
    here = [x for x in outcomes if (x.asked.kind, x.asked.J) == (kind, J)]
    epses = epses_of(here)
    rows = []
    for (name, start), end in here[0].result.items():
        cells = [end_cell(here, (name, start), eps=eps) for eps in epses]
        rows.append([read_as(name), start, f"{end.updates}", *cells])
    header = ["algorithm", "start", "policy updates", *(f"eps {eps:g}" for eps in epses)]
    return Grid(f"{title}: {END} at the end, medians", header, rows)


def forms_table(outcomes: list[Outcome]) -> Grid:
    """Shows where CAID ends, by form and eps."""
    epses = epses_of(outcomes)
    key = ("CAID, dual step 1", "lambda*")
    rows = [
        [form, *(end_cell(outcomes, key, J=1, eps=eps, kind=kind) for eps in epses)]
        for kind, form in {"exact": "exact maximiser", **POPULATION}.items()
    ]
    title = f"CAID with each label form's population minimiser: {END}, medians"
    return Grid(title, ["form", *(f"eps {eps:g}" for eps in epses)], rows)


def algorithms_by_form_table(outcomes: list[Outcome]) -> Grid:
    """Shows where every algorithm that fits labels ends, by form, at eps 0.3, from its first start."""
    first_start: dict[str, str] = {}
    for name, start in outcomes[0].result:
        first_start.setdefault(name, start)
    rows = []
    for key in first_start.items():
        if not key[0].startswith(("primal-dual", "RePO")):
            cells = (end_cell(outcomes, key, J=1, eps=0.3, kind=kind) for kind in POPULATION)
            rows.append([read_as(key[0]), *cells])
    title = f"Every algorithm by form, population minimisers, eps 0.3: {END}, medians"
    return Grid(title, ["algorithm", *POPULATION.values()], rows)


def variants_table(outcomes: list[Outcome]) -> Grid:
    """Describes the problems with other constants."""
    rows = []
    for x, eps in product(VARIANTS, epses_of(outcomes)):
        asked = (x._asdict() | {"eps": eps}).items()
        here = [outcome.result for outcome in outcomes if asked <= vars(outcome.asked).items()]
        every = [bound for line in here for bound in line["bounds"]]
        # The order P_p* <= D_p* is left out: it is an equality where there is no kink.
        sharp = [b for b in every if b["form"] == "sharp" and b["right"] > 1e-6]
        sharp = [b for b in sharp if not b["name"].startswith("order")]
        worst = max(sharp, key=lambda bound: bound["left"] / bound["right"])
        rows.append(
            [
                f"{x.J}",
                f"{x.beta:g}",
                f"{x.b}",
                f"{eps:g}",
                ", ".join(medians(line["lambda*"] for line in here)),
                number(med(line["P*"] - line["D_p*"] for line in here)),
                count(bound["holds"] for bound in every),
                escaped(f"{number(worst['left'] / worst['right'])}: {worst['name']}"),
                f"{sum(line['kink'] for line in here)}",
                count(line["reached"] for line in here),
            ]
        )
    header = [
        "J",
        "beta",
        "b",
        "eps",
        "lambda*",
        "P* - D_p*",
        "statements that hold",
        "largest sharp left / right",
        "kinks",
        "CAID at lambda*_p",
    ]
    title = "Another beta, and a second constraint that holds anyway; medians over seeds"
    return Grid(title, header, rows)


def by_beta_and_eps(outcomes: list[Outcome]) -> Iterable[tuple[list[str], list]]:
    """Yields the first cells, beta and eps, and the results of each, with the largest beta first."""
    keys = sorted({(x.asked.beta, x.asked.eps) for x in outcomes}, key=lambda k: (-k[0], k[1]))
    for beta, eps in keys:
        here = [x.result for x in outcomes if (x.asked.beta, x.asked.eps) == (beta, eps)]
        yield [f"{beta:g}", f"{eps:g}"], here


def labels_table(outcomes: list[Outcome]) -> Grid:
    """Shows eps_app by label form and number of draws."""
    rows = [
        [*cells, form, *medians(result[form] for result in here)]
        for cells, here in by_beta_and_eps(outcomes)
        for form in FORMS
    ]
    header = ["beta", "eps", "form", *(f"{n} draws" for n in outcomes[0].asked.draws)]
    return Grid("eps_app at lambda* by label form and draws a prompt, medians over seeds", header, rows)


def sources_table(outcomes: list[Outcome]) -> Grid:
    """Shows eps_app by label form and source of the pairs."""
    rows = []
    for cells, here in by_beta_and_eps(outcomes):
        for form in dict.fromkeys(form for form, _ in here[0]):
            by_source = [medians(result[form, source] for result in here) for source in SOURCES]
            rows.append([*cells, form, *map(" / ".join, by_source)])
    draws = " / ".join(map(str, SOURCE_DRAWS))
    what = f"eps_app at lambda* by label form and source of the pairs, {draws} draws a prompt"
    return Grid(f"{what}, medians over seeds", ["beta", "eps", "form", *SOURCES], rows)


def by_eps_and_name(outcomes: list[Outcome]) -> list[list[str]]:
    """Writes a row of medians for each eps and name, of results that hold a tuple
    of numbers for each name."""
    return [
        [f"{eps:g}", name, *medians(x.result[name] for x in outcomes if x.asked.eps == eps)]
        for eps in epses_of(outcomes)
        for name in outcomes[0].result
    ]


def two_ends_table(outcomes: list[Outcome]) -> Grid:
    """Shows that two ends of many draws act like a smaller beta."""
    header = ["eps", "policy", "gain of r + lambda* g", "KL, nats", "beta"]
    title = f"Two ends of {SOURCE_DRAWS[0]} draws as a smaller beta, medians over seeds"
    return Grid(title, header, by_eps_and_name(outcomes))


def standardising_table(outcomes: list[Outcome]) -> Grid:
    """Shows what standardising per group does to primal-dual."""
    header = [
        "eps",
        "advantage",
        "slack at fixed lambda*",
        "lambda - lambda*_p at the end",
        "slack there",
        "value - P_p* there",
    ]
    title = "What standardising per group does, medians over seeds"
    return Grid(title, header, by_eps_and_name(outcomes))
