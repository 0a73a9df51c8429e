"""Places that cannot be read or written, for every flag that takes one."""

import os
from collections.abc import Iterator
from pathlib import Path

from bench.faults.inputs.cells import DUAL, HEAD
from bench.faults.inputs.malformed import Malformed, with_flags

WRITTEN = {
    "train": lambda path: with_flags("--out", path),
    "evaluate": lambda path: ("engine.evaluate", "run", "--out", path),
    "export": lambda path: ("engine.export", "run", path, "--even-if"),
    "dual": lambda path: ("engine.dual", "scores.jsonl", *DUAL[:-2], "--out", path),
    "pairs": lambda path: ("engine.dual", "scores.jsonl", *DUAL, "--export-pairs", path),
    "head": lambda path: (*HEAD[:-2], "--data", "head.jsonl", "--out", path),
    "sweep": lambda path: ("engine.sweep", "--preset", "smoke", "--algorithms", "mocan", "--out", path),
}
READ = {
    "resume": lambda path: ("engine.train", "--resume", path),
    "samples-of": lambda path: with_flags("--samples-of", path),
    "samples": lambda path: with_flags("--samples", path, "--prompts", ""),
    "evaluated": lambda path: ("engine.evaluate", path),
    "exported": lambda path: ("engine.export", path, "exported", "--even-if"),
    "sweep-resume": lambda path: ("engine.sweep", "--resume", path),
    "model": lambda path: with_flags("--model", path),
    "reward": lambda path: with_flags("--reward", path),
    "scores": lambda path: ("engine.dual", path, *DUAL),
}
CANNOT_WRITE = {
    "below-a-file": "prompts.jsonl/deep/x",
    "a-file": "prompts.jsonl",
    "long": "n" * 300,
    "loop": "loop",
    "below-a-loop": "loop/x",
    "device": os.devnull,
    "system": "/proc/x",
    "long-path": "n/" * 2500,
}
CANNOT_READ = {
    "missing": "nothing",
    "a-file": "prompts.jsonl",
    "long": "n" * 300,
    "loop": "loop",
    "below-a-loop": "loop/x",
    "device": os.devnull,
    "empty-folder": "bare",
    "root": "/",
    "dot": ".",
    "odd-bytes": "a\udcffb",
    "long-path": "n/" * 2500,
    "stage-folder": "run/stages",
    "config-number": "numbered",
    "config-deep": "deep",
    "config-loop": "looped",
}


def cases() -> Iterator[Malformed]:
    """Lists places to write, then places to read."""
    for command, words in WRITTEN.items():
        for name, path in CANNOT_WRITE.items():
            # Beside a device there is a folder, in which root may write.
            ending = {"a-file": "", "device": "/x.jsonl"}.get(name, ".jsonl")
            path = path + ending if command == "pairs" else path
            # The name of a folder in /proc differs from system to system.
            yield Malformed(
                f"written/{command}/{name}", words(path), write, (path[:60], "loop"), needs="caid"
            )
    for command, words in READ.items():
        for name, path in CANNOT_READ.items():
            named = (path[:60], path.rstrip("/")[:60], "loop", "--", "a\\udcffb")
            yield Malformed(f"read/{command}/{name}", words(path), write, named, needs="caid")


def write(work: Path) -> None:
    """Writes folders that look like runs and sweeps, and a link that leads to itself."""
    (work / "loop").symlink_to("loop")
    (work / "loop.jsonl").symlink_to("loop.jsonl")
    (work / "bare").mkdir()
    for folder, text in {"numbered": "5", "deep": "[" * 100_000}.items():
        (work / folder).mkdir()
        for file in ("config.json", "sweep.json"):
            (work / folder / file).write_text(text)
    (work / "looped").mkdir()
    for file in ("config.json", "sweep.json"):
        (work / "looped" / file).symlink_to(file)
