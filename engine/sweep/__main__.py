"""Train several algorithms along a path of thresholds:
`python -m engine.sweep [flags] [-- flags of engine.train]`.

`engine.sweep.runs` says what a sweep does. Exit codes: 0 done, 2 user's error, 130 Ctrl-C.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from engine.config.flags import parse_flags, take
from engine.errors import UserError
from engine.sweep.plans import SweepConfig
from engine.sweep.runs import run_sweep

USAGE = """usage: python -m engine.sweep [flags of the sweep] [-- flags of engine.train for all runs]

    python -m engine.sweep --algorithms caid mocan --thresholds 0.2 0.3 0.4 --seeds 0 1 -- --n-prompts 200

--preset smoke    tiny random model, for trying it out
--resume FOLDER   go on with the sweep in FOLDER, with its own settings: takes no other flags
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    out = ""
    try:
        cut = argv.index("--") if "--" in argv else len(argv)
        flags, common = argv[:cut], argv[cut + 1 :]
        flags, resume = take(flags, "--resume")
        flags, preset = take(flags, "--preset")
        if preset not in (None, "smoke"):
            raise UserError(f"--preset {preset}: the only preset is smoke.")
        if resume is not None:
            if flags or common or preset:
                raise UserError(
                    f"--resume {resume}: takes no other flags; the sweep goes on with its own settings."
                )
            sweep, preset = _resumed(resume)
        else:
            sweep = parse_flags(
                SweepConfig,
                flags,
                prog="python -m engine.sweep",
                usage=USAGE,
                first="sweep's name",
                default=SweepConfig(),
            )
            if sweep is None:
                return 0
            sweep = replace(sweep, flags=(*sweep.flags, *common))
        out = sweep.out
        run_sweep(sweep, preset, resume=resume is not None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted: to go on, python -m engine.sweep --resume {out or 'FOLDER'}", file=sys.stderr)
        return 130
    return 0


def _resumed(folder: str) -> tuple[SweepConfig, str | None]:
    """Reads settings and preset of the sweep in a folder. Raises: UserError where no sweep is there."""
    try:
        settings = json.loads((Path(folder) / "sweep.json").read_text(encoding="utf-8"))
        preset = settings.pop("preset")
        if preset not in (None, "smoke"):
            raise ValueError(f"preset {preset}")
        for name, value in settings.items():
            kind = int if name == "seeds" else str
            if not (type(value) is list and all(type(x) is kind for x in value)):
                raise ValueError(f"{name} {value}")
        return SweepConfig(out=folder, **{name: tuple(value) for name, value in settings.items()}), preset
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume {folder}: no sweep is there ({type(error).__name__} at sweep.json); name the folder "
            "that --out made."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
