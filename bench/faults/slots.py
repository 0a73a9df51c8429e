"""A slot: the folder in which one case after another runs, and the undisturbed runs that were made in it.

Files may hold absolute paths, so a disturbed run has to stand where the undisturbed one stood. Two cases run
side by side in two slots, each with undisturbed runs of its own.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.faults.children import Act, Ended, call, call_on_ranks, import_learned, stand_in_for_pictures
from bench.faults.commands import COMMANDS, WARMING
from bench.faults.operations import Counter, watch
from bench.faults.outcome import Tree, tree
from bench.faults.world import write_inputs

LIMIT_S = 90.0


class Slot:
    """A working folder, and the kept copies of it after undisturbed commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.work = self.folder / "work"
        self.kept = self.folder / "kept"

    def begin(self, name: str) -> None:
        """Makes the working folder what it was after the undisturbed command `name`; "inputs": before any."""
        self.make(name)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.kept / name, self.work, symlinks=True)

    def warm_up(self) -> None:
        """Imports here what small commands import in a child, so that no later child has to."""
        self.begin("inputs")
        learned = self.folder / "modules"
        for words in WARMING:
            self.call(words, learn=learned)
            import_learned(learned.read_text().split())
        stand_in_for_pictures()

    def make(self, name: str) -> None:
        """Runs the command undisturbed and keeps the folder, unless that was done."""
        if (self.kept / name).is_dir():
            return
        if name == "inputs":
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            write_inputs(self.work)
            self.keep(name)
            return
        command = COMMANDS[name]
        self.begin(command.needs or "inputs")
        self.run_whole(command.words, name, command.ranks)

    def run_whole(self, words: Sequence[str], name: str, ranks: int = 1) -> None:
        """Runs a command that has to go through, and keeps the folder as `name`."""
        counters = [Counter() for _ in range(ranks)]
        if ranks == 1:
            ended = self.call(words, before=lambda: watch(self.work, counters[0]))
        else:
            ended = self.call_on_ranks(words, ranks, before=lambda rank: watch(self.work, counters[rank]))
        assert ended.code == 0, f"{' '.join(words)} ended with {ended.code} undisturbed: {ended.err}"
        operations, n_bytes = counters[0].read()
        of_ranks = [counter.read()[0] for counter in counters]
        about = {
            "operations": operations,
            "of_ranks": of_ranks,
            "writes": [counter.writes() for counter in counters] if ranks > 1 else [],
            "bytes": n_bytes,
            "seconds": ended.seconds,
        }
        self.kept.mkdir(parents=True, exist_ok=True)
        (self.kept / f"{name}.json").write_text(json.dumps(about))
        self.keep(name)

    def keep(self, name: str) -> None:
        """Keeps a copy of the working folder."""
        unfinished = self.kept / f".{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(self.work, unfinished, symlinks=True)
        unfinished.rename(self.kept / name)

    def about(self, name: str) -> dict:
        """Returns how many file operations, written bytes and seconds the undisturbed command took: those of
        rank 0, and the file operations and the writes of each rank."""
        self.make(name)
        return json.loads((self.kept / f"{name}.json").read_text())

    def oracle(self, name: str, out: str) -> Tree:
        """Reads what the undisturbed command left at `out`."""
        self.make(name)
        return tree(self.kept / name / out)

    def call(
        self,
        words: Sequence[str],
        *,
        before: Callable[[], None] = lambda: None,
        limit_s: float = LIMIT_S,
        kill_after_s: float | None = None,
        learn: Path | None = None,
    ) -> Ended:
        """Runs a command in the working folder."""
        self._have_a_cache()
        return call(words, self.work, limit_s=limit_s, before=before, kill_after_s=kill_after_s, learn=learn)

    def call_on_ranks(
        self,
        words: Sequence[str],
        size: int,
        *,
        before: Callable[[int], None] = lambda rank: None,
        act: Act | None = None,
    ) -> Ended:
        """Runs a command in the working folder on several ranks."""
        self._have_a_cache()
        return call_on_ranks(words, self.work, size, limit_s=LIMIT_S, before=before, act=act)

    def _have_a_cache(self) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
