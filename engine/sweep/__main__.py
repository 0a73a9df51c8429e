"""Train several algorithms along a path of thresholds:
`python -m engine.sweep [flags] [-- flags of engine.train]`.

`engine.sweep.runs` says what a sweep does, `engine.command` lists the exit codes.
"""

import sys
from dataclasses import replace
from pathlib import Path

from engine.command import Standing, run_command
from engine.config import PRESETS
from engine.config.flags import parse_flags, take
from engine.errors import UserError
from engine.files import read_json
from engine.sweep.plans import SweepConfig, configs_of

USAGE = """usage: python -m engine.sweep [flags of the sweep] [-- flags of engine.train for all runs]

    python -m engine.sweep --algorithms caid mocan --thresholds 0.2 0.3 0.4 --seeds 0 1 -- --n-prompts 200

--preset NAME     smoke (a tiny random model, for trying it out), safe-rlhf or hh-rlhf, as in engine.train
--resume FOLDER   go on with the sweep in FOLDER, with its own settings: takes no other flags
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_command(_sweep, argv, on_ranks=True)


def _sweep(argv: list[str], standing: Standing) -> None:
    cut = argv.index("--") if "--" in argv else len(argv)
    flags, common = argv[:cut], argv[cut + 1 :]
    flags, resume = take(flags, "--resume")
    flags, preset = take(flags, "--preset")
    if resume is not None:
        if flags or common or preset:
            raise UserError(
                f"--resume {resume}: takes no other flags; the sweep goes on with its own settings."
            )
        sweep, preset = standing.first(lambda: _resumed(resume))
    else:
        words = {"prog": "python -m engine.sweep", "usage": USAGE, "first": "sweep's name"}
        sweep = parse_flags(SweepConfig(), flags, **words)
        if sweep is None:
            return
        sweep = replace(sweep, flags=(*sweep.flags, *common))
    ranks = standing.ranks
    start = "python" if ranks is None else f"torchrun --nproc-per-node {ranks.local_size}"
    standing.resumable(f"{start} -m engine.sweep", sweep.out, "sweep.json")
    # Imported here, as it loads torch.
    from engine.ranks import ALONE
    from engine.sweep.runs import run_sweep

    run_sweep(sweep, preset, resume=resume is not None, ranks=ranks or ALONE)


def _resumed(folder: str) -> tuple[SweepConfig, str | None]:
    """Reads settings and preset of the sweep in a folder. Raises: UserError where no sweep is there."""
    cure = "no sweep is there, so name the folder that --out made"
    settings = read_json(Path(folder) / "sweep.json", cure=cure)
    try:
        preset = settings.pop("preset")
        if preset not in (None, *PRESETS):
            raise ValueError(f"preset {preset}")
        for name, value in settings.items():
            kind = int if name == "seeds" else str
            if not (type(value) is list and all(type(x) is kind for x in value)):
                raise ValueError(f"{name} {value}")
        sweep = SweepConfig(out=folder, **{name: tuple(value) for name, value in settings.items()})
        configs_of(sweep, preset)
        return sweep, preset
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--resume {folder}: sweep.json holds something else ({error}); {cure}.") from error


if __name__ == "__main__":
    sys.exit(main())
