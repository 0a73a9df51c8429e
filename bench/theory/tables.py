"""The tables of docs/theory.md, made from the results of the tasks."""

import math

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.theory.bounds import Bound
from bench.theory.facts import ROUNDING
from bench.theory.labels import FORMS, SOURCE_DRAWS, SOURCES
from bench.theory.tasks import VARIANTS

Grid = tuple[str, list[str], list[list[str]]]  # title, header, rows


def problems_table(lines: list[dict]) -> Grid:
    rows = []
    for key in sorted({(x["J"], x["eps"]) for x in lines}):
        here = [x for x in lines if (x["J"], x["eps"]) == key]
        n, possible = len(here), sum(x["assumptions"]["A4"] for x in here)
        gap = [x["P*"] - x["D_p*"] for x in here]
        away = [np.linalg.norm(np.subtract(x["lambda*_p"], x["lambda*"])) for x in here]
        one = [min(x["one_shot_slack"]) for x in here]
        always = sum(all(x["assumptions"][a] for a in ("A1", "A2", "A5")) for x in here)
        rows.append([
            f"{key[0]}", f"{key[1]:g}", number(med(x["nu"] for x in here)), f"{always} of {n}", f"{possible} of {n}",
            number(med(gap)), number(max(max(0.0, x["D_p*"] - x["P_p*"]) for x in here)), f"{sum(x['kink'] for x in here)}",
            f"{sum(x['maxima'] > 1 for x in here)}", number(med(away)), f"{sum(x['reached'] for x in here)} of {n}",
            number(max(x["caid_off"][1] for x in here)),
            f"{number(med(one))} ({sum(x >= -1e-9 for x in one)} of {n})",
        ])  # fmt: skip
    header = [
        "J", "eps", "nu", "A1, A2, A5 hold", "A4 (A6, A7) hold", "P* - D_p*", "largest D_p* - P_p*", "kinks of D_p", "several maxima",
        "\\|lambda*_p - lambda*\\|", "CAID at lambda*_p after 24 iterations", "largest slack that CAID misses 0 by there",
        "one-shot slack, worst constraint (met by)",
    ]  # fmt: skip
    return "The problems, medians over seeds", header, rows


def bounds_table(lines: list[dict]) -> Grid:
    shown = [eps for eps in (0.1, 0.3, 1.0, 3.0) if any(x["eps"] == eps for x in lines)]
    found: dict[tuple[str, str], list[tuple[float, dict]]] = {}
    for x in lines:
        for b in x["bounds"]:
            found.setdefault((b["name"], b["form"]), []).append((x["eps"], b))

    def ratio(b: dict) -> float:
        return Bound(b["name"], b["form"], b["left"], b["right"]).ratio

    rows = []
    for (name, form), values in found.items():
        ratios = {eps: [r for e, b in values if e == eps and not math.isnan(r := ratio(b))] for eps in shown}
        every = [r for r in (ratio(b) for _, b in values) if not math.isnan(r)]
        rows.append([
            name.replace("|", "\\|"), form, f"{sum(b['holds'] for _, b in values)} of {len(values)}",
            *(number(med(ratios[eps])) if ratios[eps] else "" for eps in shown), number(max(every)) if every else "",
        ])  # fmt: skip
    header = [
        "statement",
        "form",
        "holds",
        *(f"left / right, eps {eps:g}" for eps in shown),
        "largest left / right",
    ]
    return "Left over right of every bound, medians over J and seeds", header, rows


def scaled_table(results: list) -> Grid:
    rows = []
    for scale in sorted({a[1] for a, _ in results}):
        here = [x for a, x in results if a[1] == scale]
        wrong: dict[str, list[float]] = {}
        for x in here:
            for b in x["bounds"]:
                # Rounding is relative to the utilities' unit.
                if b["left"] > b["right"] + ROUNDING * max(1, scale):
                    wrong.setdefault(f"{b['name']} ({b['form']})".replace("|", "\\|"), []).append(
                        b["left"] / max(b["right"], 1e-300)
                    )
        rows += [
            [f"{scale:g}", name, f"{len(r)} of {len(here)}", number(med(r))] for name, r in wrong.items()
        ] or [[f"{scale:g}", "none", "", ""]]
    return (
        "Statements that fail when the utilities' unit is changed",
        ["utilities and b times", "statement", "fails in", "left / right"],
        rows,
    )


def broken_table(lines: list[dict], flipped: tuple[float, float]) -> Grid:
    rows = []
    here = [x for x in lines if 0 < x["eps"] <= 1]
    for name in here[0]["broken"] if here else []:
        found = [x["broken"][name] for x in here]
        names = [n for reds_ in found for n in reds_]
        common = sorted(set(names), key=lambda n: (-names.count(n), n))[:3]
        rows.append(
            [name, f"{sum(bool(r) for r in found)} of {len(found)}", "; ".join(common).replace("|", "\\|")]
        )
    rows.append(
        [
            "the world returns the slack with the wrong sign",
            "1 of 1",
            f"slack of CAID {number(flipped[0])} becomes {number(flipped[1])}",
        ]
    )
    return "Broken on purpose", ["what is wrong", "turns red in", "for example"], rows


def six_table(results: list) -> Grid:
    rows = []
    for key in sorted({(a[1], a[2]) for a, _ in results}):
        here = [r for a, r in results if (a[1], a[2]) == key]
        cells = [
            f"{number(max(r[k] for r in here))} ({sum(r[k] < 1e-4 for r in here)} of {len(here)})"
            for k in here[0]
        ]
        rows.append([f"{key[0]}", f"{key[1]:g}", *cells])
    return "Largest slack of CAID after six dual steps (seeds below 1e-4)", ["J", "eps", *results[0][1]], rows


def no_gap_table(results: list) -> Grid:
    Js = sorted({a[1] for a, _ in results})
    rows = []
    for key in results[0][1]:
        name, *row = key.split("|")
        row.insert(0, read_as(name))
        for J in Js:
            here = [r[key] for a, r in results if a[1] == J]
            needed = [n for n, _ in here if n is not None]
            most = f" in {max(needed)}" if needed else ""
            row.append(f"{len(needed)} of {len(here)}{most}; {number(max(error for _, error in here))}")
        rows.append(row)
    header = ["algorithm", "start", "iterations", *(f"J {J}" for J in Js)]
    return (
        "nu = 0: runs whose errors of lambda and slack fall below 1e-6, iterations they need; largest error at the end",
        header,
        rows,
    )


def ends_table(results: list, kind: str, title: str, J: int = 1) -> Grid:
    here = [(a[2], r) for a, r in results if (a[4], a[1]) == (kind, J)]
    epses = sorted({eps for eps, _ in here})
    rows = []
    for key in here[0][1]:
        name, start = key.split("|")
        rows.append(
            [
                read_as(name),
                start,
                f"{here[0][1][key][0]}",
                *(cell([r[key] for e, r in here if e == eps], (1, 2, 3, 4)) for eps in epses),
            ]
        )
    header = ["algorithm", "start", "policy updates", *(f"eps {eps:g}" for eps in epses)]
    return (
        f"{title}: |slack| / |lambda - lambda*_p| / value - P_p* / eps_app at the end, medians",
        header,
        rows,
    )


def forms_table(results: list) -> Grid:
    """CAID by form and eps."""
    epses = sorted({a[2] for a, _ in results})
    key = "CAID, dual step 1|lambda*"
    rows = []
    for kind, name in {"exact": "exact maximiser", **POPULATION}.items():
        rows.append(
            [
                name,
                *(
                    cell([r[key] for a, r in results if a[1:3] == [1, eps] and a[4] == kind], (1, 2, 3, 4))
                    for eps in epses
                ),
            ]
        )
    header = ["form", *(f"eps {eps:g}" for eps in epses)]
    title = "CAID with each label form's population minimiser: |slack| / |lambda - lambda*_p| / value - P_p* / eps_app, medians"
    return title, header, rows


def algorithms_by_form_table(results: list) -> Grid:
    """Every algorithm that fits labels, by form, at eps 0.3."""
    first = {key.split("|")[0]: key for key in reversed(results[0][1])}
    rows = []
    for key in results[0][1]:
        name = key.split("|")[0]
        if first[name] != key or name.startswith(("primal-dual", "RePO")):
            continue
        here = {
            kind: [r[key] for a, r in results if a[1:3] == [1, 0.3] and a[4] == kind] for kind in POPULATION
        }
        rows.append([read_as(name), *(cell(values, (1, 2, 3, 4)) for values in here.values())])
    title = "Every algorithm by form, population minimisers, eps 0.3: "
    title += "|slack| / |lambda - lambda*_p| / value - P_p* / eps_app, medians"
    return title, ["algorithm", *POPULATION.values()], rows


def variants_table(results: list) -> Grid:
    rows = []
    for J, beta, b in VARIANTS:
        for eps in sorted({a[2] for a, _ in results}):
            here = [x for a, x in results if a[1:4] == [J, eps, beta] and a[4] == b]
            every = [bound for x in here for bound in x["bounds"]]
            # The order P_p* <= D_p* is an equality where there is no kink.
            sharp = [
                q
                for q in every
                if q["form"] == "sharp" and q["right"] > 1e-6 and not q["name"].startswith("order")
            ]
            worst = max(sharp, key=lambda bound: bound["left"] / bound["right"])
            rows.append([
                f"{J}", f"{beta:g}", f"{b}", f"{eps:g}", ", ".join(number(med(v)) for v in zip(*(x["lambda*"] for x in here), strict=True)),
                number(med(x["P*"] - x["D_p*"] for x in here)), f"{sum(bound['holds'] for bound in every)} of {len(every)}",
                f"{number(worst['left'] / worst['right'])}: {worst['name']}".replace("|", "\\|"),
                f"{sum(x['kink'] for x in here)}", f"{sum(x['reached'] for x in here)} of {len(here)}",
            ])  # fmt: skip
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
    return "Another beta, and a second constraint that holds anyway; medians over seeds", header, rows


def labels_table(results: list) -> Grid:
    keys = sorted({(a[2], a[1]) for a, _ in results}, key=lambda k: (-k[0], k[1]))
    draws = results[0][0][3]
    rows = []
    for beta, eps in keys:
        for name in FORMS:
            values = np.array([r[name] for a, r in results if (a[2], a[1]) == (beta, eps)])
            rows.append([f"{beta:g}", f"{eps:g}", name, *(number(x) for x in np.median(values, axis=0))])
    header = ["beta", "eps", "form", *(f"{n} draws" for n in draws)]
    return "eps_app at lambda* by label form and draws a prompt, medians over seeds", header, rows


def sources_table(results: list) -> Grid:
    rows = []
    for beta, eps in sorted({(a[2], a[1]) for a, _ in results}, key=lambda k: (-k[0], k[1])):
        here = [r for a, r in results if (a[2], a[1]) == (beta, eps)]
        for name in dict.fromkeys(key.split("|")[0] for key in here[0]):
            rows.append(
                [
                    f"{beta:g}",
                    f"{eps:g}",
                    name,
                    *(cell([r[f"{name}|{source}"] for r in here], (0, 1)) for source in SOURCES),
                ]
            )
    draws = " / ".join(map(str, SOURCE_DRAWS))
    title = f"eps_app at lambda* by label form and source of the pairs, {draws} draws a prompt, medians over seeds"
    return title, ["beta", "eps", "form", *SOURCES], rows


def two_ends_table(results: list) -> Grid:
    header = ["eps", "policy", "gain of r + lambda* g", "KL, nats", "beta"]
    return (
        f"Two ends of {SOURCE_DRAWS[0]} draws as a smaller beta, medians over seeds",
        header,
        medians(results),
    )


def standardising_table(results: list) -> Grid:
    header = [
        "eps",
        "advantage",
        "slack at fixed lambda*",
        "lambda - lambda*_p at the end",
        "slack there",
        "value - P_p* there",
    ]
    return "What standardising per group does, medians over seeds", header, medians(results)


def markdown(grid: Grid) -> str:
    title, header, rows = grid
    lines = [
        f"**{title}**".replace("|slack|", "\\|slack\\|").replace(
            "|lambda - lambda*_p|", "\\|lambda - lambda*_p\\|"
        ),
        "",
    ]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def show(grid: Grid, console: Console) -> None:
    title, header, rows = grid
    table = Table(*(h.replace("\\|", "|") for h in header), title=title)
    for row in rows:
        table.add_row(*(cell.replace("\\|", "|") for cell in row))
    console.print(table)


POPULATION = {
    "soft": "Bradley-Terry, soft",
    "regression": "pairwise regression",
    "listwise": "listwise",
    "single": "single response (DRO)",
}


def med(values) -> float:
    return float(np.median(list(values)))


def medians(results: list) -> list[list[str]]:
    """A row for each eps and name, of results of (seed, eps) that hold a tuple of numbers for each name."""
    rows = []
    for eps in sorted({a[1] for a, _ in results}):
        for name in results[0][1]:
            columns = zip(*(r[name] for a, r in results if a[1] == eps), strict=True)
            rows.append([f"{eps:g}", name, *(number(med(column)) for column in columns)])
    return rows


def number(x: float) -> str:
    """Short, with a sign where it is below 0."""
    if math.isnan(x):
        return ""
    return "0" if x == 0 else f"{x:.3g}" if 1e-2 <= abs(x) < 1e4 else f"{x:.0e}"


def read_as(name: str) -> str:
    """What an algorithm's row is called: of four papers only abstracts were at hand."""
    return f"our reading of {name}" if name in ("C-DPO", "PD-DPO", "OPD", "RePO") else name


def cell(values: list, places: tuple[int, ...]) -> str:
    return " / ".join(number(med(v[i] for v in values)) for i in places)
