"""Write a run's last iterate as a merged Hugging Face folder: `python -m engine.export RUN FOLDER`.

`engine.stages.export` says what is refused, and what the folder holds.
"""

import sys

from engine.command import Standing, run_command
from engine.config import ExportConfig
from engine.config.flags import parse_flags
from engine.errors import UserError

USAGE = "usage: python -m engine.export RUN FOLDER [flags]\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_command(_export, argv)


def _export(argv: list[str], standing: Standing) -> None:
    standing.again = lambda: "start the command again, as nothing was written"
    places: list[str] = []
    if not {"--help", "-h"} & set(argv):
        while argv and len(places) < 2 and not argv[0].startswith("-"):
            places, argv = [*places, argv[0]], argv[1:]
        if len(places) < 2:
            raise UserError("the run and the new folder come first: python -m engine.export RUN FOLDER.")
    words = {"prog": "python -m engine.export RUN FOLDER", "usage": USAGE, "first": "run and the new folder"}
    flags = parse_flags(ExportConfig(), argv, **words)
    if flags is None:
        return
    # Imported here, as it loads torch.
    from engine.stages.export import export

    export(*places, flags)


if __name__ == "__main__":
    sys.exit(main())
