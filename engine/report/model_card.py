"""The model card of an exported policy: README.md in its folder."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields

from engine.config import ALGORITHMS, shown_name
from engine.intervals import interval_text, number
from engine.records import UNIT_NAMES
from engine.verdict.evaluation import Evaluation
from engine.verdict.sentences import sentences


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
    evaluation: Evaluation | None  # None: the run ended without a verdict


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

# {_plain(facts.base)} after {shown_name(facts.algorithm)}

The weights are those of {_plain(facts.base)}, trained by {method}

## Verdict

{_verdict(facts.evaluation)}

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
        if value == f.default or f.name in ("out", "accept_changes"):
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


def _verdict(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "The run ended without a verdict: nothing is known of the constraints."
    e, percent = evaluation, f"{100 * evaluation.confidence:g} %"
    rows = [
        (f"{c.name}{f' on {c.limit.on} prompts' if c.limit.on else ''}", c.limit.asked_text(), c.estimate)
        + (f"**{c.word}**",)
        for c in e.constraints
    ]
    rows.append(("reward", "", e.reward, ""))
    rows += [(name, "never optimised", estimate, "") for name, estimate in e.audits]
    table = "\n".join(
        f"| {_cell(name)} | {asked} | {number(estimate.mean, sign='+')}, "
        f"{interval_text(estimate, e.confidence)} | {word} |"
        for name, asked, estimate, word in rows
    )
    return f"""| score | asked for | improvement over the base model | verdict |
|---|---|---|---|
{table}

Improvements are in {UNIT_NAMES[e.units]}, with {percent} intervals over {e.n_prompts} held-out prompts with
{e.n_responses} responses each. They are those of the scorers named below, on prompts of that kind.

{_bullets(sentences(e))}"""


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _plain(text: str) -> str:
    """Keeps a text of the user's from being read as HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
