"""The commands that are disturbed, and the undisturbed runs that they are compared with."""

from typing import NamedTuple

SHARED = (
    "--model model --prompts prompts.jsonl --heldout heldout.jsonl --threads 1 --n-prompts 10 "
    "--n-responses 4 --max-new-tokens 6 --steps 2 --eval-prompts 6 --eval-responses 2 --margin 0"
).split()
SMALL = ["--preset", "smoke", *SHARED, "--seed", "3", "--threshold", "0.01"]
ITERATIVE = "--iterations 2 --slack-prompts 3".split()
FULL = "--tune full --learning-rate 1e-5".split()


class Command(NamedTuple):
    """A command line, and where it leaves what."""

    words: tuple[str, ...]
    out: str  # what it makes, below the working folder
    needs: str = ""  # the command whose result it starts from
    resumes: bool = False  # goes on with --resume OUT where OUT holds `begun`
    begun: str = "config.json"
    appears: str = ""  # the folder that appears whole at the end
    ranks: int = 1


def _train(algorithm: str, *flags: str) -> Command:
    return Command(("engine.train", algorithm, *SMALL, *flags, "--out", "run"), "run", resumes=True)


COMMANDS = {
    "caid": _train("caid", *ITERATIVE),
    "mocan": _train("mocan"),
    "pecan": _train("pecan", "--preference-steps", "2"),
    "primal_dual": _train("primal_dual", *ITERATIVE, "--ascent-prompts", "4"),
    "full": _train("caid", *ITERATIVE, *FULL),
    "policy-pairs": _train("caid", *ITERATIVE, "--pairs", "policy"),
    "resume": Command(("engine.train", "--resume", "run"), "run", needs="caid"),
    "evaluate": Command(
        ("engine.evaluate", "run", "--n-responses", "3"), "run", needs="caid", appears="run/evaluation-1"
    ),
    # Verdicts on so few prompts are not resolved.
    "export": Command(
        ("engine.export", "run", "exported", "--even-if"), "exported", needs="caid", appears="exported"
    ),
    "samples-of": Command(
        ("engine.train", "mocan", *SMALL, "--samples-of", "run", "--out", "second"),
        "second",
        needs="caid",
        resumes=True,
    ),
    "dual": Command(tuple("engine.dual scores.jsonl --cost harm --threshold 0.1 --out dual".split()), "dual"),
    "head": Command(
        tuple("engine.train head --data head.jsonl --model model --layer 2 --out trained".split()), "trained"
    ),
    "sweep": Command(
        (
            *"engine.sweep --preset smoke --algorithms mocan dpo".split(),
            *"--thresholds 0.01 --seeds 3 --out sweep --".split(),
            *SHARED,
        ),
        "sweep",
        resumes=True,
        begun="sweep.json",
    ),
}
for _name in ("resume", "evaluate", "export"):
    COMMANDS[f"full-{_name}"] = COMMANDS[_name]._replace(needs="full")
# A second iteration would repeat on every rank what the first one does.
_ONCE = "--iterations 1 --slack-prompts 3 --checkpoint-every 1".split()
for _ranks in (2, 4):
    COMMANDS[f"caid-on-{_ranks}"] = _train("caid", *_ONCE)._replace(ranks=_ranks)
COMMANDS["full-on-2"] = _train("caid", *_ONCE, *FULL)._replace(ranks=2)
COMMANDS["sweep-resume"] = Command(("engine.sweep", "--resume", "sweep"), "sweep", needs="sweep")


def again(name: str, begun: bool) -> tuple[str, ...]:
    """Returns the words that go on after a command was stopped: its own, or --resume where it has begun."""
    command = COMMANDS[name]
    if command.resumes and begun:
        return command.words[0], "--resume", command.out
    return command.words


# Together they import what any command imports.
WARMING = (
    (*COMMANDS["mocan"].words, "--cost", "odd=classifier", "--force"),
    COMMANDS["dual"].words,
    COMMANDS["head"].words,
)
