"""Train a policy: `python -m engine.train [ALGORITHM] [flags]`.

The command line becomes one config dataclass, then the algorithm's file does the rest. All flags are checked
before anything heavy is imported, so a typing mistake costs a tenth of a second. `engine.command` lists the
exit codes.
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

from engine.command import Standing, run_command
from engine.config import (
    ALGORITHMS,
    OF_THE_COMMAND,
    RunConfig,
    check,
    preset_named,
    published,
    without_epochs,
)
from engine.config.flags import names_of, parse_flags, parted, suggest, take
from engine.config.settings_file import read_settings
from engine.errors import UserError

USAGE = """usage: python -m engine.train [ALGORITHM] [--preset NAME] [--config FILE] [--resume RUN] [flags]

algorithms, each with its own flags (python -m engine.train ALGORITHM --help):
{algorithms}

--preset NAME     other defaults; flags that you give win (not for head)
                  smoke: the whole loop on a tiny random model in under 30 seconds
                  safe-rlhf, hh-rlhf: the papers' protocols, see docs/protocols.md
--config FILE     read settings from a YAML file (steps: 8), or from the config.json of a run, which is then
                  repeated into another folder; flags that you give win
--resume RUN      go on with the interrupted run in that folder, with its own settings and inputs: takes no
                  other flag but --accept-changes, which lets a changed scorer pass, --require-met and
                  --model-ranks
--help-all        show all flags; --help shows the usual ones
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_command(_train, argv, on_ranks=True)


def _train(argv: list[str], standing: Standing) -> None:
    algorithm, flags = _algorithm(argv)
    flags, resume = take(flags, "--resume")
    preset = take(flags, "--preset")[1]
    if resume is None:
        config = parse(algorithm, flags)
        if config is None:
            return
        resume = _left_by_lost_ranks(config, standing)
        if resume is not None:
            algorithm, begun = standing.first(lambda: _resumed(resume, algorithm, []))
            config = _commanded(begun, config)
    else:
        own, others = parted(flags, OF_THE_COMMAND)
        named = algorithm if argv[0] == algorithm else None
        algorithm, begun = standing.first(lambda: _resumed(resume, named, others))
        words = {"prog": "python -m engine.train", "usage": USAGE, "first": "run folder"}
        config = _commanded(begun, parse_flags(type(begun)(), own, **words))
    chosen = ALGORITHMS[algorithm]
    ranks = standing.ranks
    if not chosen.trains_policy:
        chosen.train(config, **({} if ranks is None else {"ranks": ranks}))
        return
    start = "python" if ranks is None else f"torchrun --nproc-per-node {ranks.local_size}"
    sliced = f" --model-ranks {config.model_ranks}" if config.model_ranks > 1 else ""
    standing.resumable(f"{start} -m engine.train{sliced}", resume or config.out, "config.json")
    check(config)
    if ranks is None or ranks.is_first:
        # What follows loads torch, which takes seconds.
        print(f"{chosen.shown}: reading the model, the prompts and the scorers", flush=True)
    if preset is not None:
        _find(preset, config)
    how = ({} if resume is None else {"resume": resume}) | ({} if ranks is None else {"ranks": ranks})
    result = chosen.train(config, **how)
    if config.require_met:
        # Imported here, as it loads torch.
        from engine.verdict.sentences import check_met

        check_met(result.evaluation)


def _left_by_lost_ranks(config: RunConfig, standing: Standing) -> str | None:
    """Returns the run folder with which ranks go on that torchrun has started anew; None where there is none,
    or these are the first ones."""
    ranks, out = standing.ranks, getattr(config, "out", "")
    if ranks is None or not out or not ranks.restarted():
        return None
    return out if ranks.first(lambda: (Path(out) / "config.json").is_file()) else None


def _commanded(begun: RunConfig, given: RunConfig) -> RunConfig:
    """Returns the settings with which a run began, and of those that are given what is the command's own."""
    return replace(begun, **{name: getattr(given, name) for name in OF_THE_COMMAND})


def _find(preset: str, config: RunConfig) -> None:
    """Looks for what a preset names. Raises: UserError naming all that is missing."""
    if wanted := published(preset, config):
        # Imported here, as it loads torch.
        from engine.stages.published import check_published

        check_published(preset, wanted)


def parse(algorithm: str, flags: list[str]):
    """Reads the algorithm's config from `flags`, on top of the defaults, the preset and the file of --config,
    in this order; None after printing help.

    Raises: UserError for an unknown preset, file or flag, a stray word, or a value of the wrong type.
    """
    flags, preset = take(flags, "--preset")
    chosen = ALGORITHMS[algorithm]
    default = chosen.config_class()
    if preset is not None:
        default = preset_named(preset, algorithm).apply(default)
    usage = USAGE.format(algorithms="\n".join(f"  {name:<12}{row.help}" for name, row in ALGORITHMS.items()))
    words = {
        "prog": f"python -m engine.train {algorithm}",
        "usage": usage,
        "first": "algorithm",
        "others": ("--preset", "--config", "--resume", "--help-all"),
        "grouped": chosen.trains_policy,
    }
    flags, file = take(flags, "--config")
    if file is not None:
        settings = read_settings(file)
        if settings.algorithm not in (None, algorithm):
            raise UserError(
                f"--config {file}: its settings are those of {settings.algorithm}, not of {algorithm}; name "
                "the same algorithm in both."
            )
        try:
            if "epochs" not in names_of(settings.flags):
                default = without_epochs(default, settings.flags)
            default = parse_flags(default, settings.flags, **words)
        except UserError as error:
            raise UserError(f"--config {file}: {error}") from None
    return parse_flags(without_epochs(default, flags), flags, **words)


def _algorithm(argv: list[str]) -> tuple[str, list[str]]:
    """Splits the algorithm's name from the rest of the command line; where none is given, it is that of
    --config, or caid."""
    if not argv or argv[0].startswith("-"):
        _, file = take(argv, "--config")
        named = None if file is None else read_settings(file).algorithm
        return _known(named or "caid"), argv
    return _known(argv[0]), argv[1:]


def _known(algorithm: str) -> str:
    """Returns the name of an algorithm. Raises: UserError where there is none of that name."""
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"unknown algorithm {algorithm!r}.{suggest(algorithm, list(ALGORITHMS))} Choose from "
            f"{', '.join(ALGORITHMS)}."
        )
    return algorithm


def _resumed(folder: str, named: str | None, flags: list[str]) -> tuple[str, object]:
    """Reads algorithm and config as saved in the run folder. `named`: the algorithm
    that the user gave, if any."""
    if flags:
        raise UserError(
            f"--resume {folder}: takes no other flags, but got {flags[0]}; the run goes on with its own "
            "settings."
        )
    # Imported here, as reading a run needs torch.
    from engine.run.contents import read_contents

    contents = read_contents(Path(folder))
    algorithm, values = contents.algorithm, contents.config
    if algorithm not in ALGORITHMS or not ALGORITHMS[algorithm].trains_policy:
        raise UserError(f"--resume {folder}: a run of {algorithm!r} cannot be resumed; start it again.")
    if named not in (None, algorithm):
        raise UserError(
            f"--resume {folder}: that is a run of {algorithm}, not of {named}; leave {named} out."
        )
    config_class = ALGORITHMS[algorithm].config_class
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"--resume {folder}: its config has the unknown field {unknown[0]!r}; resume with the version "
            "that started it."
        )
    return algorithm, config_class(**values)


if __name__ == "__main__":
    sys.exit(main())
