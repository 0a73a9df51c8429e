"""Kills every command at random moments and before its file operations, then goes on."""

import json
import random
from collections.abc import Sequence
from functools import partial

from bench.faults.cases import Case
from bench.faults.commands import COMMANDS, again
from bench.faults.operations import KillAt, watch
from bench.faults.outcome import REFUSED, WRONG, Outcome, Tree, compared, ending, tree
from bench.faults.slots import Slot

TRAINED = ("caid", "mocan", "pecan", "primal_dual", "full", "policy-pairs")
KILLED = (*TRAINED, "resume", "evaluate", "export", "samples-of", "dual", "head", "sweep")
OPERATIONS = 24  # points of a command at which it is killed, spread evenly
MOMENTS = 6


def cases(slot: Slot, seed: int, commands: Sequence[str] = KILLED) -> list[Case]:
    """Lists the kills of all commands."""
    listed = []
    for name in commands:
        rng = random.Random(f"{seed} kills {name}")
        total = slot.about(name)["operations"]
        step = max(1, total // OPERATIONS)
        for n in range(1 + rng.randrange(step), total + 1, step):
            listed.append(Case(f"kills/{name}/operation-{n}", (name,), partial(at_operation, name=name, n=n)))
        for share in sorted(round(rng.random(), 3) for _ in range(MOMENTS)):
            listed.append(
                Case(f"kills/{name}/moment-{share}", (name,), partial(at_moment, name=name, share=share))
            )
    return listed


def at_operation(slot: Slot, name: str, n: int) -> Outcome:
    """Kills a command at its n-th file operation and goes on."""
    command = COMMANDS[name]
    slot.begin(command.needs or "inputs")
    slot.call(command.words, before=lambda: watch(slot.work, KillAt(n)))
    return go_on(slot, name)


def at_moment(slot: Slot, name: str, share: float) -> Outcome:
    """Kills a command after a share of its usual time and goes on."""
    command = COMMANDS[name]
    slot.begin(command.needs or "inputs")
    slot.call(command.words, kill_after_s=share * slot.about(name)["seconds"])
    return go_on(slot, name)


def go_on(slot: Slot, name: str) -> Outcome:
    """Goes on after a kill and compares everything in the working folder with the undisturbed one."""
    command = COMMANDS[name]
    out = slot.work / command.out
    oracle = tree(slot.kept / name)
    if command.appears and (slot.work / command.appears).exists():
        # The kill came after the result was whole, and before the record of it.
        found = tree(slot.work)
        for each in (found, oracle):
            each.pop("run/judged.jsonl", None)
        return compared(found, oracle)
    begun = (out / command.begun).exists()
    work = {path for path in tree(out) if path not in ("stages",)} if out.is_dir() else set()
    ended = slot.call(again(name, begun))
    outcome = ending(ended, [command.out])
    if outcome is None:
        return compared(looked_once(tree(slot.work)), looked_once(oracle))
    if outcome.kind == REFUSED and work and name != "resume":
        return Outcome(WRONG, f"blocked after the kill: {outcome.detail}")
    return outcome


def looked_once(found: Tree) -> Tree:
    """Drops lines of judged.jsonl that stand there twice, and one that the kill has cut: whoever reads the
    file leaves it out."""
    name = "run/judged.jsonl"
    if isinstance(content := found.get(name), bytes):
        lines = dict.fromkeys(content.splitlines(keepends=True))
        found[name] = b"".join(line for line in lines if _is_json(line))
    return found


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
