"""Write a run's last iterate as a merged Hugging Face folder: `python -m engine.export RUN FOLDER`.

The folder has a model card with the run's verdict. `--push-to-hub` uploads it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from engine import model
from engine.command import Standing, run_command
from engine.config.flags import parse_flags
from engine.errors import NotMet, UserError
from engine.files import is_file, one_line
from engine.model.folder import digests, is_hub_id
from engine.policy.steps import Policy
from engine.policy.weights import policy_of, trained_weights
from engine.report.model_card import CardFacts, model_card
from engine.run import outputs
from engine.run.committed import Committed, read_committed
from engine.run.folder import RunFolder
from engine.stages.inputs import DEFAULT_MODEL, model_folder
from engine.stages.run_inputs import RunInputs, owned_inputs
from engine.verdict.evaluation import Evaluation

USAGE = "usage: python -m engine.export RUN FOLDER [flags]\n"
DEFAULT_MODEL_ID = f"HuggingFaceTB/{DEFAULT_MODEL}"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the last iterate of a run as a merged Hugging Face folder with a model card."""

    push_to_hub: str = ""
    """Also upload the folder to this repository of the hub, OWNER/NAME, with the token of `hf auth login`.
    Refused while a constraint is not met."""
    even_if: bool = False
    """Upload a policy that does not meet every constraint; its model card says so."""


def export(run: str | Path, folder: str | Path, flags: ExportConfig = ExportConfig()) -> None:
    """Merges the run's last adapter into its base model, or takes all its weights, and writes `folder`, which
    transformers and vLLM load.

    Raises: UserError when the run has no iterate yet, its model is another one now, or the folder exists;
    NotMet where a policy that does not meet every constraint is to be uploaded.
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
    evaluation = read_verdict(committed)
    if flags.push_to_hub:
        check_push(run, evaluation, flags)
    card = model_card(_facts(committed, owned.record, iterate, evaluation))
    policy = committed.load(f"iteration-{iterate}/policy", Policy)
    network = model.load(base, dtype="float32")
    merged, adapter = policy_of(network, trained_weights(network, config, policy.adapter))
    model.save(merged, folder, adapter=adapter, tokenizer_from=RunFolder(run).model, card=card)
    print(f"wrote {folder}")
    if flags.push_to_hub:
        push(folder, flags.push_to_hub)


def read_verdict(committed: Committed) -> Evaluation | None:
    """Reads the run's verdict; None where it has none yet.

    Raises: UserError where evaluation.json is not as the run wrote it.
    """
    paths = RunFolder(committed.folder)
    if not is_file(paths.evaluation) and not outputs.has(paths, paths.evaluation):
        return None
    if not outputs.is_whole(paths, paths.evaluation):
        raise UserError(
            f"{paths.evaluation} is not as the run wrote it; python -m engine.train --resume "
            f"{committed.folder} makes it again."
        )
    return Evaluation.read(paths.evaluation, cure="resume the run to have the file written again")


def check_push(run: Path, evaluation: Evaluation | None, flags: ExportConfig) -> None:
    """Refuses to publish what nobody should take for aligned, before any work. Raises: UserError; NotMet."""
    target = f"--push-to-hub {flags.push_to_hub}"
    if not is_hub_id(flags.push_to_hub):
        raise UserError(f"{target}: no name of the form OWNER/NAME; give one.")
    if flags.even_if:
        return
    if evaluation is None:
        raise NotMet(f"{target}: {run} has no verdict yet; let it end, or upload it with --even-if.")
    short = [f"{c.name} is {c.word}" for c in evaluation.constraints if c.word != "met"]
    if short:
        raise NotMet(
            f"{target}: {'; '.join(short)}; train it further, judge it on more prompts, or upload it "
            "with --even-if."
        )


def push(folder: Path, name: str) -> None:
    """Uploads a folder to a repository of the hub, and makes the repository where there is none.

    Raises: UserError where that fails; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the merged policy")
    except Exception as error:  # whatever the network, the hub or a missing token raises
        raise UserError(
            f"--push-to-hub {name}: {type(error).__name__}: {one_line(error)}; {folder} is written, so "
            f"upload it with: hf upload {name} {folder}"
        ) from error
    print(f"uploaded to {name}")


def _facts(committed: Committed, inputs: RunInputs, iterate: int, evaluation: Evaluation | None) -> CardFacts:
    contents, config = committed.contents, committed.config
    sources = {flag: ", ".join(Path(file).name for file in files) for flag, files in inputs.sources.items()}
    shipped = "the project's own"
    held_out = shipped if config.judged_on_shipped else config.heldout or "held out of these"
    trained_on = sources.get(
        "--samples", sources.get("--prompts", config.samples or config.prompts or shipped)
    )
    data = [
        f"training prompts: {min(config.n_prompts, len(inputs.train))} of {len(inputs.train)} "
        f"({trained_on}), {config.n_responses} responses each",
        f"held-out prompts: {min(config.eval_prompts, len(inputs.heldout))} of {len(inputs.heldout)} "
        f"({sources.get('--heldout', held_out)})",
    ]
    for name, pairs in (("pairs", inputs.pairs), ("preferences", inputs.preferences)):
        if pairs is not None:
            data.append(f"{name}: {len(pairs.prompts)} ({Path(pairs.source).name})")
    return CardFacts(
        algorithm=contents.algorithm,
        config=contents.config,
        versions=contents.versions,
        iterate=iterate,
        base=Path(config.model or DEFAULT_MODEL).name,
        base_id=config.model if is_hub_id(config.model) else "" if config.model else DEFAULT_MODEL_ID,
        data=data,
        evaluation=evaluation,
    )


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
    if flags is not None:
        export(*places, flags)


if __name__ == "__main__":
    sys.exit(main())
