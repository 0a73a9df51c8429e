"""Writes a run's last iterate as a merged Hugging Face folder, for `engine.export`.

A policy whose verdict on all constraints together is not "met" is refused, unless --even-if asks for it, or
--or-reference for the unchanged model in its place. The folder has a model card with the run's certificate.
`--push-to-hub` uploads it.
"""

import sys
from pathlib import Path

from engine import model
from engine.config import ExportConfig
from engine.constraints.judging import MET
from engine.errors import NotMet, UserError
from engine.files import is_file, json_bytes, one_line
from engine.model.folder import digests, is_hub_id
from engine.policy.steps import Policy
from engine.policy.weights import policy_of, trained_weights
from engine.report import certificate
from engine.report.model_card import CardFacts, model_card
from engine.run import outputs
from engine.run.committed import Committed, read_committed
from engine.run.folder import RunFolder
from engine.stages.inputs import DEFAULT_MODEL, model_folder
from engine.stages.run_inputs import RunInputs, owned_inputs

DEFAULT_MODEL_ID = f"HuggingFaceTB/{DEFAULT_MODEL}"


def export(run: str | Path, folder: str | Path, flags: ExportConfig) -> None:
    """Merges the run's last adapter into its base model, or takes all its weights, and writes `folder`, which
    transformers and vLLM load.

    Raises: UserError when the run has no iterate yet, its model is another one now, or the folder exists;
    NotMet for a policy that is not met, see `ExportConfig`.
    """
    _check_flags(flags)
    run, folder = Path(run), Path(folder)
    owned, committed = owned_inputs(run), read_committed(run)
    config = committed.config
    base = model_folder(config.model)
    for line in owned.check_model(base, digests(base)):
        print(line, file=sys.stderr)
    committed.check_whole()
    iterate = max(committed.iterates, default=0)
    found = read_verdict(committed, flags.verdict)
    unmet = found is None or found["word"] != MET
    reference = flags.or_reference and found is not None and unmet
    if not (iterate or reference):
        raise committed.lacks("iterate")
    if unmet and not (flags.even_if or reference):
        raise _not_met(run, found)
    policy = committed.load(f"iteration-{iterate}/policy", Policy) if iterate else None
    if found is not None:
        _check_about(found, policy, iterate, flags.verdict)
    card = model_card(_facts(committed, owned.record, iterate, found, reference=reference))
    beside = {"README.md": card.encode()}
    network, adapter = model.load(base, dtype="float32"), None
    if policy is not None and not reference:
        network, adapter = policy_of(network, trained_weights(network, config, policy.adapter))
        if found is not None:
            beside[RunFolder(run).certificate.name] = json_bytes(found)
    model.save(network, folder, adapter=adapter, tokenizer_from=RunFolder(run).model, beside=beside)
    if reference:
        print(f"no solution found: the verdict is {found['word']}, so the reference is exported, unchanged")
    print(f"wrote {folder}")
    if flags.push_to_hub:
        push(folder, flags.push_to_hub)


def _check_flags(flags: ExportConfig) -> None:
    """Refuses flags that no export can use. Raises: UserError."""
    if flags.push_to_hub and not is_hub_id(flags.push_to_hub):
        raise UserError(f"--push-to-hub {flags.push_to_hub}: no name of the form OWNER/NAME; give one.")
    if flags.even_if and flags.or_reference:
        raise UserError("--even-if and --or-reference ask for two policies; leave one of them out.")


def read_verdict(committed: Committed, folder: str = "") -> dict | None:
    """Reads the certificate of the run's verdict, or that in `folder`; None where the run has none yet.

    Raises: UserError where certificate.json is not as it was written.
    """
    paths = RunFolder(committed.folder)
    if folder:
        return certificate.read(RunFolder(Path(folder)).certificate, cure="judge the run again")
    again = f"python -m engine.train --resume {committed.folder} makes it again"
    known = outputs.has(paths, paths.evaluation) or is_file(paths.evaluation)
    if not known and not is_file(paths.certificate):
        return None
    found = certificate.read(paths.certificate, cure=again)
    if outputs.damaged(paths, paths.certificate):
        raise UserError(f"{paths.certificate} is not as the run wrote it; {again}.")
    return found


def _not_met(run: Path, found: dict | None) -> NotMet:
    """Returns the error for a policy that nobody should take for aligned."""
    anyway = "or export it with --even-if"
    if found is None:
        return NotMet(f"{run} has no verdict yet; let it end, {anyway}.")
    words = "; ".join(f"{c['name']} is {c['word']}" for c in found["constraints"])
    return NotMet(
        f"{run}: the verdict is {found['word']} ({words}); train it further, judge it on more prompts and "
        f"name that --verdict, export the reference with --or-reference, {anyway}."
    )


def _check_about(found: dict, policy: Policy | None, iterate: int, folder: str) -> None:
    """Checks that a certificate is about the policy that is exported. Raises: UserError."""
    if found["digests"]["policy"] != ("" if policy is None else certificate.weights_digest(policy.adapter)):
        judged = found["run"]["iterate"]
        which = f"--verdict {folder}" if folder else "certificate.json"
        raise UserError(
            f"{which}: it is about other weights than those of iterate {iterate}, the last one (it judged "
            f"iterate {judged}); judge that one."
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


def _facts(
    committed: Committed, inputs: RunInputs, iterate: int, found: dict | None, *, reference: bool
) -> CardFacts:
    contents, config = committed.contents, committed.config
    sources = {flag: ", ".join(Path(file).name for file in files) for flag, files in inputs.sources.items()}
    shipped = "the project's own"
    held_out = shipped if config.judged_on_shipped else config.heldout or "held out of these"
    trained_on = sources.get(
        "--samples", sources.get("--prompts", config.samples or config.prompts or shipped)
    )
    judged = found["sampling"]["prompts"] if found else min(config.eval_prompts, len(inputs.heldout))
    data = [
        f"training prompts: {min(config.n_prompts, len(inputs.train))} of {len(inputs.train)} "
        f"({trained_on}), {config.n_responses} responses each",
        f"held-out prompts: {judged} of {len(inputs.heldout)} ({sources.get('--heldout', held_out)})",
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
        certificate=found,
        reference=reference,
    )
