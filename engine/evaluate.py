"""`python -m engine.evaluate RUN [flags]`: judge an iterate of a run on held-out
prompts, with fresh responses, see `engine.stages.evaluate`.

With --profile it judges on sets of safe and unsafe prompts instead, see `engine.stages.profile`. With --plan
it judges nothing, and says how many prompts a verdict needs, see `engine.stages.plan`.
"""

import sys

from engine.command import Standing, run_command
from engine.config import EvaluateConfig
from engine.config.flags import parse_flags
from engine.errors import UserError

USAGE = (
    "usage: python -m engine.evaluate RUN [flags]\n       python -m engine.evaluate [RUN] --plan [flags]\n\n"
    "RUN is the folder of a run of engine.train with at least one iterate; --plan needs none.\n"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_command(_evaluate, argv, on_ranks=True)


def _evaluate(argv: list[str], standing: Standing) -> None:
    standing.again = lambda: "start the command again, as nothing was written"
    run = ""
    if not ("--help" in argv or "-h" in argv or (argv[:1] and argv[0].startswith("-") and "--plan" in argv)):
        if not argv or argv[0].startswith("-"):
            raise UserError("no run is named; usage: python -m engine.evaluate RUN [flags], see --help.")
        run, argv = argv[0], argv[1:]
    words = {"prog": "python -m engine.evaluate RUN", "usage": USAGE, "first": "run folder"}
    flags = parse_flags(EvaluateConfig(), argv, **words)
    if flags is None:
        return
    # Imported here, as it loads torch.
    from engine.ranks import ALONE
    from engine.stages import evaluate, plan, profile
    from engine.verdict.sentences import check_met

    ranks = standing.ranks or ALONE
    if flags.plan:
        ranks.first(lambda: plan.say(run, flags))
    elif flags.profile:
        profile.run_profile(run, flags, ranks)
    else:
        judgement, _ = evaluate.run_evaluation(run, flags, ranks)
        if flags.require_met:
            check_met(judgement.evaluation)


if __name__ == "__main__":
    sys.exit(main())
