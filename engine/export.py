"""Write a run's last iterate as a merged Hugging Face folder: `python -m engine.export RUN FOLDER`."""

import sys
from pathlib import Path

from engine import model
from engine.command import Standing, run_command
from engine.model.folder import digests
from engine.policy.steps import Policy
from engine.policy.weights import policy_of, trained_weights
from engine.run.committed import read_committed
from engine.run.folder import RunFolder
from engine.stages.inputs import model_folder
from engine.stages.run_inputs import owned_inputs


def export(run: str | Path, folder: str | Path) -> None:
    """Merges the run's last adapter into its base model, or takes all its weights, and writes `folder`, which
    transformers and vLLM load.

    Raises: UserError when the run has no iterate yet, its model is another one now, or the folder exists.
    """
    run, folder = Path(run), Path(folder)
    owned, committed = owned_inputs(run), read_committed(run)
    config = committed.config
    base = model_folder(config.model)
    for line in owned.check_model(base, digests(base)):
        print(line, file=sys.stderr)
    committed.check_whole()
    iterate = max(committed.iterates, default=0)
    if not iterate:
        raise committed.lacks("iterate")
    policy = committed.load(f"iteration-{iterate}/policy", Policy)
    network = model.load(base, dtype="float32")
    merged, adapter = policy_of(network, trained_weights(network, config, policy.adapter))
    model.save(merged, folder, adapter=adapter, tokenizer_from=RunFolder(run).model)


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
