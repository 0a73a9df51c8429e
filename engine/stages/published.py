"""Looks for what a preset names before anything is sampled: all of it at once, so that one message lists what
is missing."""

from collections.abc import Mapping

from engine.data.tables import read_rows
from engine.errors import UserError
from engine.files import is_there
from engine.model.folder import resolve

DATA = ("--prompts", "--heldout", "--pairs", "--preferences")


def check_published(preset: str, wanted: Mapping[str, str]) -> None:
    """Fetches what is no folder here. Once a hub did not give something, only its cache is searched for the
    rest.

    wanted: a flag and its value -> the repository in it. Raises: UserError naming all that is missing.
    """
    missing, reason = [], ""
    for flag, repository in wanted.items():
        if is_there(repository):
            continue
        is_data = flag.startswith(DATA)
        if reason:
            missing += [] if _is_cached(repository, is_data) else [flag]
            continue
        try:
            next(read_rows(flag.partition(" ")[2])) if is_data else resolve(repository)
        except UserError as error:
            missing, reason = [flag], str(error).rstrip(".")
    if missing:
        raise UserError(
            f"--preset {preset}: not found: {', '.join(missing)} ({reason}). Fetch them from the Hugging "
            "Face hub into folders of these names, or name others with these flags."
        )


def _is_cached(repository: str, is_data: bool) -> bool:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, repo_type="dataset" if is_data else "model", local_files_only=True)
    except Exception:  # whatever is wrong with it, it is not there
        return False
    return True
