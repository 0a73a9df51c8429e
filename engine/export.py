"""Write a run's last iterate as a merged Hugging Face folder: `python -m engine.export RUN FOLDER`."""

import sys
from pathlib import Path

from engine import model
from engine.command import Standing, run_command
from engine.errors import UserError
from engine.model.folder import fingerprint
from engine.policy.iterates import is_saved, load_weights
from engine.policy.weights import policy_of
from engine.run.folder import RunFolder
from engine.run.run import Run
from engine.stages.inputs import model_folder


def export(run: str | Path, folder: str | Path) -> None:
    """Merges the run's last adapter into its base model, or takes all its weights, and writes `folder`, which
    transformers and vLLM load.

    Raises: UserError when the run has no iterate yet, its model is another one now, or the folder exists.
    """
    run, folder = Path(run), Path(folder)
    _, config = Run.read_config(run)
    numbered = {number: path for number, path in RunFolder(run).iterates().items() if is_saved(path)}
    if not numbered:
        raise UserError(
            f"{run} has no iterate yet; finish the run with python -m engine.train --resume {run}."
        )
    base = model_folder(config["model"])
    Run.check_model(run, fingerprint(base))
    network = model.load(base, dtype="float32")
    policy, adapter = policy_of(network, load_weights(numbered[max(numbered)], network))
    model.save(policy, folder, adapter=adapter, tokenizer_from=base)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_command(_export, argv)


def _export(argv: list[str], standing: Standing) -> int:
    if len(argv) != 2 or argv[0] in ("-h", "--help"):
        print("usage: python -m engine.export RUN FOLDER", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    export(*argv)
    print(f"wrote {argv[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
