"""The model card of an exported policy: README.md in its folder."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from engine.config import ALGORITHMS, OF_THE_COMMAND, shown_name
from engine.intervals import Share, interval_text, number
from engine.records import UNIT_NAMES


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says of a run."""

    algorithm: str
    config: dict  # the run's settings
    versions: dict  # of the packages, and the commit
    iterate: int
    base: str  # how the base model is called for people
    base_id: str  # its id on the hub; "" where it has none
    data: Sequence[str]  # what the run learned from and was judged on, with counts
    certificate: Mapping | None  # as `engine.report.certificate` gives it; None: there is no verdict
    reference: bool = False  # no solution was found, and these are the weights of the base model


def model_card(facts: CardFacts) -> str:
    """Writes the card in Markdown, with the metadata that a hub reads at the top."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        base_model=facts.base_id or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["constrained-alignment", facts.algorithm],
    )
    scorers = [
        f"reward `{facts.config['reward']}`",
        *(f"cost `{cost}`" for cost in facts.config["cost"]),
        *(f"audit `{audit}` (never optimised)" for audit in facts.config["audit"]),
    ]
    method = " ".join(ALGORITHMS[facts.algorithm].config_class.__doc__.split("\n\n")[0].split())
    return f"""---
{metadata.to_yaml()}
---

{_opening(facts, method)}

## Verdict

{_verdict(facts.certificate)}

## What it was made from

{_bullets([*scorers, *facts.data])}

## How to make it again

```bash
{command_line(facts.algorithm, facts.config)}
```

Iterate {facts.iterate} of the run. Commit {facts.versions.get("commit", "unknown")}; \
{", ".join(f"{name} {value}" for name, value in sorted(facts.versions.items()) if name != "commit")}.
"""


def command_line(algorithm: str, config: dict) -> str:
    """Returns the command that repeats a run: its settings that are not the defaults."""
    words = ["python", "-m", "engine.train", algorithm]
    for f in fields(ALGORITHMS[algorithm].config_class):
        value = config.get(f.name, f.default)
        if value == f.default or f.name in ("out", *OF_THE_COMMAND):
            continue
        flag = f"--{f.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}" if str(value).startswith("-") else flag)
            words += [] if str(value).startswith("-") else [str(value)]
    return shlex.join(words)


def _opening(facts: CardFacts, method: str) -> str:
    base, algorithm = _plain(facts.base), shown_name(facts.algorithm)
    if not facts.reference:
        return f"# {base} after {algorithm}\n\nThe weights are those of {base}, trained by {method}"
    return f"""# {base}: no solution found

The weights are those of {base}, unchanged. A policy was trained by {method}

It is not shown to meet what was asked, so that no solution was found, and the model before training stands
here in its place. The verdict below is on that policy, which is not in this folder."""


def _verdict(found: Mapping | None) -> str:
    if found is None:
        return "The run ended without a verdict: nothing is known of the constraints."
    confidence, sampling = found["confidence"], found["sampling"]
    rows = [
        (c["name"] + (f" on {c['on']} prompts" if c["on"] else ""), c["asked"], c["improvement"] or c)
        + (f"**{c['word']}**",)
        for c in found["constraints"]
    ]
    rows.append(("reward", "", found["reward"], ""))
    rows += [(audit["name"], "never optimised", audit, "") for audit in found["audits"]]
    table = "\n".join(
        f"| {_cell(name)} | {asked} | {number(e['mean'], sign='+')}, {_interval(e, confidence)} | {word} |"
        for name, asked, e, word in rows
    )
    return f"""All constraints together: **{found["word"]}**.

| score | asked for | improvement over the base model | verdict |
|---|---|---|---|
{table}

Improvements are in {UNIT_NAMES[found["units"]]}, with {100 * confidence:g} % intervals over \
{sampling["prompts"]} held-out prompts with {sampling["responses"]} responses each. They are those of the
scorers named below, on prompts of that kind.

{_bullets(found["statement"])}

## What the verdict covers, and what it rests on

{_plain(found["covers"])}

{_bullets(found["assumptions"])}

Earlier verdicts on this policy or on some of these prompts: {found["earlier_verdicts"]}. SHA-256 of the
held-out prompts: `{found["digests"]["held-out prompts"]}`; of the trained weights: \
`{found["digests"]["policy"]}`; of the content of certificate.json: `{found["sha256"]}`."""


def _interval(e: Mapping, confidence: float) -> str:
    return interval_text(Share(**{name: e[name] for name in ("mean", "low", "high", "n")}), confidence)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _plain(text: str) -> str:
    """Keeps a text of the user's from being read as HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
