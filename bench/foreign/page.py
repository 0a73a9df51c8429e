"""The page docs/foreign.md."""

import math
import statistics
from collections.abc import Sequence

from bench.foreign.pairs import FAR, PAIRS, RULES, SLACK_NATS, SPIKE, THRESHOLDS, UNFINISHED
from bench.foreign.runs import REFUSED, causes, ratio
from engine.intervals import t_quantile

WORDS = ("met", "not met", "not resolved")


def page_text(rows: Sequence[dict]) -> str:
    """Returns the page on runs, as `bench.foreign.runs.read` measures them."""
    runs = trained(rows)
    lines = [
        "# Rewards and costs that nobody tuned for",
        "",
        "Settings were found on the project's own heads, so other scorers have to say what they are worth. "
        f"{len(PAIRS)} pairs of a reward and a cost, most of them a few lines of Python "
        "(`bench/foreign/scorers.py`), were fixed before any run, with the thresholds "
        f"{' and '.join(f'{b:g}' for b in THRESHOLDS)} and with what is measured. Both rules train the "
        "quickstart's model on the same samples of its reference: *plain* are the papers' rules, with beta "
        "1 and three answers to a prompt of a slack, as the defaults were before, *defaults* "
        "those that bound what an iteration may do to a policy ([The algorithms](algorithms.md)). "
        "Improvements are on held-out prompts, in within-prompt standard deviations of the reference; a "
        "minus before a score turns it round. A verdict takes one look, at 96 prompts x 6 responses. Both "
        "rules aim at b plus the same margin, so that improvements above b are asked for.",
        "",
        "A policy ran away where",
        "",
        f"- *KL*: its KL is above {FAR:g} times that of the tilt at its lambda, plus {SLACK_NATS:g} nats,",
        f"- *unfinished*: its answers are finished less often, by {100 * UNFINISHED:g} points,",
        f"- *loss*: one training step had {SPIKE:g} times the median loss of the run.",
        "",
        *_by_rules(rows),
        "",
        *_paired(runs),
        "",
        "![Improvement less b, and KL against the tilt's](foreign.png)",
        "",
        *table(runs),
        "",
        *_refused(rows),
        *_commands(rows),
    ]
    return "\n".join(lines) + "\n"


def trained(rows: Sequence[dict]) -> list[dict]:
    """Returns the runs that were not refused before training."""
    return [r for r in rows if r["word"] != REFUSED]


def table(rows: Sequence[dict]) -> list[str]:
    """Returns the lines of a Markdown table of runs."""
    cells = [
        [
            r["pair"],
            f"{r['b']:g}",
            r["rules"],
            r["word"],
            f"{r['improvement']:+.2f} [{r['low']:.2f}, {r['high']:.2f}]",
            f"{r['off']:.2f}",
            f"{r['reward']:+.2f}",
            f"{r['kl']:.2f} / {r['tilt']:.2f}",
            f"{100 * r['finished'][0]:.0f} -> {100 * r['finished'][1]:.0f} %",
            f"{r['spike']:.1f}",
            ", ".join(f"{x:.2f}" for x in r["lam"]),
            ", ".join(causes(r)),
        ]
        for r in rows
    ]
    header = [
        *("reward against cost", "b", "rules", "word", "improvement, 95 %", "off b", "reward"),
        *("KL / tilt's, nats", "finished", "largest / median loss", "lambda", "ran away"),
    ]
    return _lines(header, cells)


def summary(rows: Sequence[dict]) -> str:
    """Sums the trained runs of a rule up in a line."""
    said = ", ".join(f"{sum(r['word'] == word for r in rows)} {word}" for word in WORDS)
    off, reward = (statistics.fmean(r[key] for r in rows) for key in ("off", "reward"))
    return (
        f"{len(rows)} runs: {said}; {sum(bool(causes(r)) for r in rows)} ran away; mean |improvement - b| "
        f"{off:.2f}, reward {reward:+.2f}, median KL / tilt's {statistics.median(map(ratio, rows)):.2f}"
    )


def _lines(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + len(header) * "---|"]
    return lines + [f"| {' | '.join(row)} |" for row in cells]


def _by_rules(rows: Sequence[dict]) -> list[str]:
    """Returns the table of what the runs of each rule came to."""
    cells = []
    for rules in RULES:
        asked = [r for r in rows if r["rules"] == rules]
        of = trained(asked)
        if not of:
            continue
        lost = [100 * (r["finished"][1] - r["finished"][0]) for r in of]
        cells.append(
            [
                rules,
                f"{len(asked)}",
                *(f"{sum(r['word'] == word for r in asked)}" for word in (REFUSED, *WORDS)),
                f"{sum(bool(causes(r)) for r in of)}",
                *(f"{sum(cause in causes(r) for r in of)}" for cause in ("KL", "unfinished", "loss")),
                f"{statistics.fmean(r['off'] for r in of):.2f}",
                f"{statistics.fmean(r['reward'] for r in of):+.2f}",
                f"{statistics.median(map(ratio, of)):.2f}, {max(map(ratio, of)):.2f}",
                f"{statistics.fmean(lost):+.1f}, {min(lost):+.1f}",
                f"{max(r['spike'] for r in of):.0f}",
            ]
        )
    header = [
        *(
            "rules",
            "asked for",
            REFUSED,
            *WORDS,
            "ran away",
            "KL",
            "unfinished",
            "loss",
            "mean distance from b",
        ),
        *("mean reward", "KL / tilt's: median, largest", "finished, points: mean, least"),
        "largest / median loss",
    ]
    return _lines(header, cells)


def _paired(rows: Sequence[dict]) -> list[str]:
    """Says by how much the rules differ where both have a run. The unit is the pair of scorers."""
    first, second = RULES
    found = {(r["pair"], r["b"], r["seed"], r["rules"]): r for r in rows}
    others = {key: (*key[:3], second) for key in found if key[3] == first}
    twins = [(found[key], found[other]) for key, other in others.items() if other in found]
    units: dict[str, list[tuple[dict, dict]]] = {}
    for plain, own in twins:
        units.setdefault(plain["pair"], []).append((plain, own))
    lines = [
        f"{second.capitalize()} less {first}, over {len(twins)} pairs of runs with {len(units)} pairs of "
        "scorers, which are the unit of the t intervals:",
        "",
    ]
    measures = {
        "distance from b": lambda r: r["off"],
        "reward": lambda r: r["reward"],
        "KL, nats": lambda r: r["kl"],
        "finished answers, points": lambda r: 100 * r["finished"][1],
    }
    cells = []
    for name, of in measures.items():
        by_unit = [statistics.fmean(of(own) - of(plain) for plain, own in unit) for unit in units.values()]
        cells.append([name, _interval(by_unit)])
    return lines + _lines(["measure", "mean difference, 95 %"], cells)


def _interval(values: Sequence[float]) -> str:
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def _refused(rows: Sequence[dict]) -> list[str]:
    """Lists what was refused before training."""
    found = dict.fromkeys(f"{r['pair']} (b {r['b']:g})" for r in rows if r["word"] == REFUSED)
    if not found:
        return []
    return [
        "Refused before training, with a sentence, as no weighting of 8 responses to each prompt of the "
        f"reference improves by b on average: {', '.join(found)}.",
        "",
    ]


def _commands(rows: Sequence[dict]) -> list[str]:
    """Says how the runs were made."""
    dtypes, commits = (", ".join(sorted({r[key][:12] for r in rows})) for key in ("dtype", "commit"))
    ran = {r["pair"] for r in rows}
    left = ", ".join(str(pair) for pair in PAIRS if str(pair) not in ran)
    return [
        *([f"Not run: {left}.", ""] if left else []),
        f"Command: `python -m bench.foreign`, {dtypes}, commit {commits}. The tilt's KL is that which 8 "
        "responses of the reference show, at most log 8. Each rule has one run of a pair, threshold and "
        "seed; all look at the same held-out prompts, so that intervals hold for these.",
    ]
