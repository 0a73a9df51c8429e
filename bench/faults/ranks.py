"""Kills and stops ranks of a run at seeded moments, inside each kind of write and at other file operations,
then goes on with as many ranks."""

import random
import re
import signal
from collections.abc import Sequence
from functools import partial

from bench.faults.cases import Case
from bench.faults.children import Act, Ended
from bench.faults.commands import COMMANDS, again
from bench.faults.kills import looked_once
from bench.faults.operations import KillAt, watch
from bench.faults.outcome import CLEAN, HANG, TRACEBACK, WRONG, Outcome, compared, last_line, tree
from bench.faults.slots import Slot

KILLED = ("caid-on-2", "caid-on-4", "full-on-2")
# Of each command: a rank that writes is killed inside a write of each kind of file and at operations spread
# evenly, any rank at moments, and one is stopped. Rank 0 writes everything but the shards of other ranks with
# --tune full. Runs with an adapter write the same on 2 and on 4 ranks, and share out the kinds; of a run that
# trains all weights only what holds these is written in another way.
OPERATIONS, MOMENTS, STOPS = 3, 4, 6
SHARED = ("caid-on-2", "caid-on-4")
WEIGHTS = ("model", "shard", "stage", "state")
LATEST = 0.8  # share of the undisturbed time, which one with less beside it takes less of
# What a rank says of the end of all.
SAID = re.compile(r"(rank \d+: )?(error|stopped|interrupted)\b")
GONE_S = 10.0  # so long after one rank has ended the last one is gone at the latest


def cases(slot: Slot, seed: int, commands: Sequence[str] = KILLED) -> list[Case]:
    """Lists the kills and stops of all commands."""
    listed = []
    for name in commands:
        rng, about, ranks = random.Random(f"{seed} ranks {name}"), slot.about(name), COMMANDS[name].ranks
        for rank, operations in enumerate(about["of_ranks"]):
            if not operations:
                continue
            kinds: dict[str, list[int]] = {}
            for n, file in about["writes"][rank]:
                kinds.setdefault(kind_of(file), []).append(n)
            if name in SHARED:
                own = sorted(kinds)[SHARED.index(name) :: len(SHARED)]
            else:
                own = [kind for kind in sorted(kinds) if kind.startswith(WEIGHTS)]
            step = max(1, operations // OPERATIONS)
            chosen = {n: "operation" for n in range(1 + rng.randrange(step), operations + 1, step)}
            chosen |= {rng.choice(kinds[kind]): f"writes-{kind}" for kind in own}
            for n, what in sorted(chosen.items()):
                case = partial(at_operation, name=name, rank=rank, n=n)
                listed.append(Case(f"ranks/{name}/rank-{rank}-{what}-{n}", (name,), case))
        for what, number, count in (
            ("killed", signal.SIGKILL, MOMENTS),
            ("interrupted", signal.SIGINT, STOPS - STOPS // 2),
            ("terminated", signal.SIGTERM, STOPS // 2),
        ):
            for _ in range(count):
                rank, share = rng.randrange(ranks), round(LATEST * rng.random(), 3)
                act = Act(rank, number, share * about["seconds"])
                title = f"ranks/{name}/rank-{rank}-{what}-{share}"
                listed.append(Case(title, (name,), partial(at_moment, name=name, act=act)))
    return listed


def kind_of(file: str) -> str:
    """Names the kind of a file that a run writes: stages are one kind, states inside them another."""
    name = file.removesuffix(".tmp")
    if re.match(r"\d", name):
        return "state" if ".partial" in name else "stage"
    return re.sub(r"[\d-]*\d", "N", name)


def at_operation(slot: Slot, name: str, rank: int, n: int) -> Outcome:
    """Kills a rank at its n-th file operation, and goes on."""

    def before(own: int) -> None:
        if own == rank:
            watch(slot.work, KillAt(n))

    slot.begin("inputs")
    return _go_on(slot, name, slot.call_on_ranks(COMMANDS[name].words, COMMANDS[name].ranks, before=before))


def at_moment(slot: Slot, name: str, act: Act) -> Outcome:
    """Sends a signal to one rank and goes on."""
    slot.begin("inputs")
    return _go_on(slot, name, slot.call_on_ranks(COMMANDS[name].words, COMMANDS[name].ranks, act=act))


def _go_on(slot: Slot, name: str, ended: Ended) -> Outcome:
    """Looks at how all ranks have ended, goes on, and compares everything with the undisturbed run."""
    command = COMMANDS[name]
    if ended.hung:
        return Outcome(HANG, "ranks were left after one had ended")
    if "Traceback (most recent call last)" in ended.err:
        return Outcome(TRACEBACK, last_line(ended.err))
    said = [line for line in ended.err.splitlines() if SAID.match(line)]
    if len(said) > 1:
        return Outcome(WRONG, f"said {len(said)} times: {' | '.join(said)[:300]}")
    if ended.code and ended.seconds > GONE_S:
        return Outcome(WRONG, f"the last rank was gone {ended.seconds:.1f} s after the first")
    begun = (slot.work / command.out / command.begun).exists()
    after = slot.call_on_ranks(again(name, begun), command.ranks)
    if after.hung:
        return Outcome(HANG, "ranks that went on did not end")
    if after.code:
        return Outcome(WRONG, f"blocked, exit code {after.code}: {last_line(after.err)}")
    found = compared(looked_once(tree(slot.work)), looked_once(tree(slot.kept / name)))
    how = f"last rank gone after {ended.seconds:.2f} s" if ended.code else "had ended before"
    return Outcome(CLEAN, how) if found.kind == CLEAN else found
