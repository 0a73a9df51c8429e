"""Malformed classifiers, and adapters that were changed after a run had saved them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.faults.alterations import template
from bench.faults.edits import change_weights
from bench.faults.inputs.malformed import Malformed, with_flags
from bench.faults.world import change_json

Write = Callable[[Path], object]
# A file that is no part of a model, and names of labels that it has not: the weights say how many there are.
ACCEPTED = ("extra-file", "labels-many")


def cases() -> Iterator[Malformed]:
    """Lists classifiers, then adapters."""
    for name, write in _classifiers().items():
        words = with_flags("--cost", "odd=classifier")
        yield Malformed(f"classifier/{name}", words, write, ("classifier", "odd"), name in ACCEPTED)
    for name, change in _adapters().items():
        words = ("engine.export", "run", "exported", "--even-if")
        named = ("iteration-2", "adapter", "run")
        yield Malformed(f"adapter/{name}", words, change, named, needs="caid", restores=True)


def _classifiers() -> dict[str, Write]:
    """Returns classifiers whose files are missing, cut or odd."""

    def config(key: str, value: object) -> Write:
        return lambda work: change_json(work / "classifier" / "config.json", key, value)

    return {
        "no-config": lambda work: (work / "classifier" / "config.json").unlink(),
        "no-weights": lambda work: (work / "classifier" / "model.safetensors").unlink(),
        "weights-cut": lambda work: os.truncate(work / "classifier" / "model.safetensors", 999),
        "no-tokenizer": lambda work: [path.unlink() for path in (work / "classifier").glob("*token*")],
        "labels-list": config("id2label", ["a", "b"]),
        "labels-many": config("id2label", {str(i): f"l{i}" for i in range(7)}),
        "architecture": config("model_type", "gpt9"),
        "auto-map": config("auto_map", {"AutoModelForSequenceClassification": "x.Y"}),
        "size": config("hidden_size", 24),
        "vocabulary": config("vocab_size", 7),
        "layers": config("num_hidden_layers", 9),
        "template": template("classifier", "{{ 1 / 0 }}"),
        "template-loop": template(
            "classifier", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        ),
        "extra-file": lambda work: (work / "classifier" / "x.txt").write_text("a"),
        "adapter": lambda work: (work / "classifier" / "adapter_config.json").write_text("{}"),
        "config-deep": lambda work: (work / "classifier" / "config.json").write_text("[" * 100_000),
    }


def _adapters() -> dict[str, Write]:
    """Returns changes of a saved adapter before it is exported; the run knows what it wrote."""

    def config(key: str, value: object) -> Write:
        return lambda work: change_json(work / "run/adapters/iteration-2/adapter_config.json", key, value)

    changes = {
        "r": ("x", 0, -1, 10**9, 3),
        "lora_alpha": ("x", None, 99),
        "target_modules": ([], "all", ["nothing"], 5),
        "peft_type": ("IA3", 5),
        "use_dora": (True,),
        "fan_in_fan_out": (True,),
        "use_rslora": (True,),
        "layers_to_transform": ([99], "x"),
        "rank_pattern": ({"q_proj": 3}, 5),
        "bias": ("all",),
        "modules_to_save": (["lm_head"],),
        "lora_bias": (True,),
    }
    cases: dict[str, Write] = {
        f"{key}/{json.dumps(value)}": config(key, value)
        for key, values in changes.items()
        for value in values
    }
    return cases | {
        "weights-bit": lambda work: _flip(work / "run/adapters/iteration-2/adapter_model.safetensors"),
        "model-bit": lambda work: change_weights(work / "model"),
    }


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
