"""Digests of what a run writes outside its stages: outputs.json.

Nothing is computed from these files, and a resumed run makes them again from its stages. So a digest only
tells whether that is needed.
"""

from collections.abc import Iterable
from pathlib import Path

from engine.files import move_aside, parse_json, sha256_of_file, write_json
from engine.run.folder import RunFolder


def note(paths: RunFolder, written: Iterable[Path]) -> None:
    """Notes the digests of files that were written whole, and of all files of folders that were."""
    digests = noted(paths) | {_name(paths, file): sha256_of_file(file) for file in _files(written)}
    move_aside(paths.outputs)
    write_json(paths.outputs, {name: digests[name] for name in digests if (paths.path / name).is_file()})


def has(paths: RunFolder, path: Path) -> bool:
    """Tells whether a file, or files of a folder, were noted."""
    return any(path in (file, *file.parents) for file in map(paths.path.joinpath, noted(paths)))


def is_whole(paths: RunFolder, path: Path) -> bool:
    """Tells whether a file, or every noted file of a folder, is as it was noted."""
    return has(paths, path) and not damaged(paths, path)


def damaged(paths: RunFolder, path: Path) -> list[str]:
    """Lists the noted files of a folder that are missing or changed, by their names in the run folder."""
    return [
        name
        for name, digest in noted(paths).items()
        if path in ((paths.path / name), *(paths.path / name).parents)
        and not _matches(paths.path / name, digest)
    ]


def noted(paths: RunFolder) -> dict[str, str]:
    """Reads the digests, by name in the run folder; none where the file itself is damaged."""
    try:
        # A name that stands there twice stands in the place of another one.
        digests = parse_json(paths.outputs.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return digests if isinstance(digests, dict) else {}


def _files(written: Iterable[Path]) -> list[Path]:
    return [
        file
        for path in written
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]


def _name(paths: RunFolder, file: Path) -> str:
    return file.relative_to(paths.path).as_posix()


def _matches(file: Path, digest: object) -> bool:
    try:
        return file.is_file() and sha256_of_file(file) == digest
    except OSError:
        return False
