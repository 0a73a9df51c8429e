"""Absurd numbers, words and combinations of flags of every command."""

import typing
from collections.abc import Iterator
from dataclasses import fields

from bench.faults.commands import SHARED
from bench.faults.inputs.cells import DUAL, HEAD
from bench.faults.inputs.malformed import Malformed, with_flags

FLOATS = ("nan", "inf", "-inf", "1e300", "-1e300")
WHOLES = ("nan", "1.5", str(10**18), str(-(10**18)), "1" * 5000)
WORDS = ("",)
# Numbers that mean something: no limit, or a cost that keeps its threshold.
MEANT = {
    ("seed", str(10**18)),
    ("seed", str(-(10**18))),
    ("max_kl", "inf"),
    ("max_kl_ratio", "inf"),
    ("cost_mean", "inf"),
    ("cost_mean", "1e300"),
    ("cost_worst", "inf"),
    ("cost_worst", "1e300"),
    ("unsafe_above", "1e300"),
}
SWEEP = ("engine.sweep", "--preset", "smoke", "--out", "sweep")
ALONE = ("--algorithms", "mocan", "--thresholds", "0.01")


def _small_sweep(*flags: str) -> tuple[str, ...]:
    """Returns the words of a sweep that ends in seconds."""
    return (*SWEEP, *flags, "--", *SHARED)


LINES = {
    "unknown-flag": with_flags("--colour", "red"),
    "stray-word": ("engine.train", "mocan", "red"),
    "unknown-algorithm": ("engine.train", "mocam"),
    "single-dash": with_flags("-x"),
    "no-value": with_flags("--seed"),
    "two-values": with_flags("--seed", "1", "2"),
    "preset": ("engine.train", "--preset", "large"),
    "preset-alone": ("engine.train", "--preset"),
    "switch-value": with_flags("--force", "yes"),
    "cost-twice": with_flags("--cost", "harm", "harm"),
    "thresholds": with_flags("--threshold", "0.1", "0.2"),
    "single-labels": with_flags("--labels", "odd"),
    "schedule": with_flags("--schedule", "zigzag"),
    "device": with_flags("--device", "abacus"),
    "dtype": with_flags("--dtype", "int3"),
    "full-default-rate": with_flags("--tune", "full"),
    "rates": with_flags("--cost-rate", "0.1", "0.2"),
    "both-limits": with_flags("--cost-rate", "0.1", "--cost-mean", "1"),
    "cost-on": with_flags("--cost-on", "nothing"),
    "pairs-policy": with_flags("--pairs", "policy"),
    "column": with_flags("--prompt-column", "nothing"),
    "surrogate-system": with_flags("--system", "a\udcffb"),
    "long-system": with_flags("--system", "word " * 3000),
    "responses-above": with_flags("--responses-per-prompt", "99"),
    "samples-of-none": with_flags("--samples-of", "nothing"),
    "resume-with-flags": ("engine.train", "--resume", "run", "--seed", "1"),
    "resume-alone": ("engine.train", "--resume"),
    "threshold-beyond": with_flags("--threshold", "50"),
    "temperature-small": with_flags("--temperature", "1e-8"),
    "temperature-large": with_flags("--temperature", "1e7"),
    "top-p-small": with_flags("--top-p", "1e-300"),
    "sweep-algorithm": (*SWEEP, "--algorithms", "mocam"),
    "sweep-threshold": (*SWEEP, "--thresholds", "much"),
    "sweep-equal": _small_sweep(*ALONE, "0.01000001"),
    "sweep-same": _small_sweep("--algorithms", "mocan", *ALONE[1:]),
    "sweep-seeds": _small_sweep(*ALONE, "--seeds", "3", "3"),
    "sweep-override": (*SWEEP, "--algorithms", "mocan:threshold=0.9"),
    "sweep-out": (*SWEEP, "--algorithms", "mocan:out=x"),
    "sweep-seed-override": (*SWEEP, "--algorithms", "mocan:seed=4"),
    "sweep-nan": (*SWEEP, "--thresholds", "nan"),
    "sweep-infinite": (*SWEEP, "--thresholds", "1e308"),
    "sweep-comma": (*SWEEP, "--thresholds", "0.1,0.2"),
    "sweep-empty-threshold": (*SWEEP, "--thresholds", ""),
    "sweep-seed-huge": (*SWEEP, "--seeds", str(2**64)),
    "sweep-seed-behind": (*SWEEP, "--", "--seed", "3"),
    "sweep-unknown-behind": (*SWEEP, "--", "--colour", "red"),
    "sweep-setting": (*SWEEP, "--algorithms", "mocan:colour=red"),
    "sweep-colon": _small_sweep("--algorithms", "mocan:", *ALONE[2:]),
    "sweep-none": (*SWEEP, "--algorithms"),
    "sweep-no-thresholds": (*SWEEP, "--thresholds"),
    "sweep-no-seeds": (*SWEEP, "--seeds"),
    "sweep-long": (*SWEEP, "--algorithms", "mocan:steps=" + "1" * 300),
    "sweep-resume-none": ("engine.sweep", "--resume", "nothing"),
    "sweep-dash": (*SWEEP, "--thresholds", "-"),
    "dual-no-threshold": ("engine.dual", "scores.jsonl", "--cost", "harm"),
    "dual-no-file": ("engine.dual",),
    "dual-two-thresholds": ("engine.dual", "scores.jsonl", "--cost", "harm", "--threshold", "1", "2"),
    "dual-column": ("engine.dual", "scores.jsonl", "--cost", "colour", "--threshold", "1"),
    "dual-reward": ("engine.dual", "scores.jsonl", "--cost", "reward", "--threshold", "1"),
    "dual-twice": ("engine.dual", "scores.jsonl", "--cost", "harm", "harm", "--threshold", "0.1", "0.1"),
    "dual-beyond": ("engine.dual", "scores.jsonl", "--cost", "harm", "--threshold", "30"),
    "evaluate-none": ("engine.evaluate",),
    "evaluate-missing": ("engine.evaluate", "nothing"),
    "export-one": ("engine.export", "run"),
    "export-none": ("engine.export",),
    "export-three": ("engine.export", "a", "b", "c"),
    "head-none": ("engine.train", "head"),
    "head-no-out": ("engine.train", "head", "--data", "head.jsonl"),
    "head-loss": (*HEAD, "--data", "head.jsonl", "--loss", "odd"),
    "head-layer": (*HEAD[:4], "--layer", "99", "--data", "head.jsonl", "--out", "trained"),
    "head-twice": (*HEAD, "--data", "head.jsonl", "head.jsonl", "--test", "head.jsonl"),
}
# Commands that print how they are used.
SAYS_USAGE = {"evaluate-none", "export-one", "export-none", "export-three"}
FINE = {
    "sweep-colon", "sweep-equal", "sweep-same", "sweep-seeds", "threshold-beyond", "top-p-small",
    "long-system",
}  # fmt: skip
# Thresholds that are two numbers are two runs, however near they lie.
MADE = {"sweep-equal": ("sweep/mocan-b0.01-seed0", "sweep/mocan-b0.01000001-seed0")}


def cases() -> Iterator[Malformed]:
    """Lists absurd numbers for every number of every command, then lines that make no sense."""
    from engine.config import EvaluateConfig
    from engine.config.algorithms import CaidConfig, PrimalDualConfig, SacpoConfig, SafeDpoConfig
    from engine.dual.config import DualConfig
    from engine.scorers.head_config import HeadConfig

    seen: set[str] = set()
    for algorithm, kind in (
        ("caid", CaidConfig),
        ("primal_dual", PrimalDualConfig),
        ("sacpo", SacpoConfig),
        ("safe_dpo", SafeDpoConfig),
    ):
        base = ("engine.train", algorithm)
        yield from _numbers(
            kind, lambda flag, value, b=base: (*b, *with_flags(flag, value)[2:]), algorithm, seen
        )
    yield from _numbers(
        EvaluateConfig, lambda flag, value: ("engine.evaluate", "run", flag, value), "evaluate", set(), "caid"
    )
    dual = ("engine.dual", "scores.jsonl")
    yield from _numbers(
        DualConfig, lambda flag, value: (*dual, *_without(DUAL, flag), flag, value), "dual", set()
    )
    head = (*HEAD, "--data", "head.jsonl")
    yield from _numbers(HeadConfig, lambda flag, value: (*_without(head, flag), flag, value), "head", set())
    for name, words in LINES.items():
        yield Malformed(f"lines/{name}", words, accepts=name in FINE, made=MADE.get(name, ()))


def _without(words: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Leaves a flag and its value out."""
    if flag not in words:
        return words
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


def _numbers(kind: type, words, command: str, seen: set[str], needs: str = "inputs") -> Iterator[Malformed]:
    """Lists absurd numbers of each field of a config that was not seen yet."""
    types = typing.get_type_hints(kind)
    for name in [field.name for field in fields(kind)]:
        element = types[name].__args__[0] if hasattr(types[name], "__args__") else types[name]
        if element not in (int, float) or name in seen:
            continue
        seen.add(name)
        flag = f"--{name.replace('_', '-')}"
        for value in WHOLES if element is int else FLOATS:
            yield Malformed(
                f"numbers/{command}/{name}/{value[:22]}",
                words(flag, value),
                named=(flag, "--"),
                accepts=(name, value) in MEANT,
                needs=needs,
            )
