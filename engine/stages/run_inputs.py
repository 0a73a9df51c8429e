"""The inputs of a run, as they were when it began: a resumed run, and whoever judges it, go on with these."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.config import RunConfig
from engine.data.response_pairs import ResponsePairs
from engine.data.samples_file import GivenSamples
from engine.data.tables import files_of
from engine.data.templates import TEMPLATES
from engine.errors import UserError
from engine.files import append_line, is_file, move_aside, read_json_lines, sha256_of_file, write_whole
from engine.records import Prompts
from engine.run.contents import Contents, read_contents
from engine.run.folder import RunFolder
from engine.run.store import Torn, read_whole, save, unpack_file

# transformers reads a chat template from this file before any other.
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The record in inputs.safetensors."""

    train: Prompts  # all prompts to train on, of which a run uses a subset
    heldout: Prompts
    pairs: ResponsePairs | None  # of the file of --pairs
    preferences: ResponsePairs | None
    reading: list[str]  # says what prompts were read as, and which rows were left out
    began: str  # the time that a chat template which asks for it is told, ISO 8601; "" where none does
    sources: dict[str, dict[str, str]]  # flag -> file -> SHA-256 of what was read
    model: dict[str, str]  # file of the model's folder -> SHA-256
    scorers: dict[str, dict[str, str]]  # what each scorer is, as `engine.scorers.find.content` gives it
    samples: GivenSamples | None = None  # of the file of --samples
    template: str = ""  # the text of --template; "" where the model's own files say how prompts are written


@dataclass(frozen=True, kw_only=True)
class OwnedInputs:
    """The inputs of a run that exists."""

    run: Path
    contents: Contents
    record: RunInputs

    def check_model(self, source: Path, digests: Mapping[str, str]) -> list[str]:
        """Compares the model's folder, now with these digests, with what the run read.

        Where the run's copy of a file is damaged, it is restored from that folder. Returns what to say of it.
        Raises: UserError for other weights or another config.json, and for a damaged copy whose file there
        has changed.
        """
        said = []
        for name, digest in self.record.model.items():
            now = digests.get(name, "")
            if is_model(name) and now != digest:
                raise UserError(
                    f"{self.run} was trained from another model: {source / name} "
                    f"{'is missing' if not now else 'has changed since'} (SHA-256 {digest[:12]}, here "
                    f"{now[:12] or 'none'}); put the original back."
                )
            if name not in self._copied():
                continue
            copy = RunFolder(self.run).model / name
            if _digest(copy) != digest:
                if now != digest:
                    raise UserError(
                        f"{copy} is damaged, and {source / name} has changed since the run began; put the "
                        "original of one of them back."
                    )
                move_aside(copy)
                copy.parent.mkdir(parents=True, exist_ok=True)
                write_whole(copy, (source / name).read_bytes())
                said.append(f"{copy} was damaged: restored from {source}")
            elif now != digest:
                said.append(
                    f"{source / name} {'has changed' if now else 'is gone'} since the run began; the run "
                    "goes on with its own copy"
                )
        copy = RunFolder(self.run).model / TEMPLATE_FILE
        if self.record.template and not _holds(copy, self.record.template):
            write_whole(copy, self.record.template.encode())
            said.append(f"{copy} was damaged: restored from what --template gave")
        for name in sorted(set(digests) - set(self.record.model)):
            said.append(f"{source / name} is new since the run began; the run goes on without it")
        return said

    def copies_are_whole(self) -> bool:
        """Tells whether the run's copies of the model's files are as they were made."""
        folder, template = RunFolder(self.run).model, self.record.template
        return (not template or _holds(folder / TEMPLATE_FILE, template)) and all(
            _digest(folder / name) == digest for name, digest in self._copied().items()
        )

    def _copied(self) -> dict[str, str]:
        """Returns the digests of those files of the model's folder of which the run keeps copies."""
        own = {TEMPLATE_FILE} if self.record.template else set()
        files = self.record.model.items()
        return {name: digest for name, digest in files if is_copied(name) and name not in own}

    def check_sources(self) -> list[str]:
        """Returns what to say of files of prompts and pairs that have changed since they were read."""
        return [
            f"{flag} {file} {'has changed' if Path(file).exists() else 'is gone'} since the run began; "
            "the run goes on with what it read then"
            for flag, files in self.record.sources.items()
            for file, digest in files.items()
            if _digest(Path(file)) != digest
        ]

    def check_scorers(self, now: Mapping[str, Mapping[str, str]], *, accept: bool) -> list[str]:
        """Compares the scorers with those of the run's beginning; returns what to say of accepted changes and
        of a scorer that was put back after one.

        Raises: UserError for a change that is not accepted.
        """
        said, accepted = [], self.accepted()
        for name, scorer in self.record.scorers.items():
            began = scorer["sha256"]
            if name not in now or now[name]["sha256"] == accepted.get(name, began):
                continue
            what = f"scorer {name} ({now[name]['source']})"
            if now[name]["sha256"] == began:
                said.append(
                    f"{what} is again as it was when {self.run} began: scores from here on are its own, "
                    "those since --accept-changes are of the changed one"
                )
                continue
            changed = f"{what} has changed since {self.run} began"
            if not accept:
                raise UserError(
                    f"{changed}, so its scores would not compare; put the original back, or go "
                    "on with it by --accept-changes."
                )
            said.append(f"{changed}; --accept-changes: scores from here on are those of the changed one")
        return said

    def accept(self, now: Mapping[str, Mapping[str, str]]) -> None:
        """Notes the scorers with which a run goes on where they are others than before, so that a change need
        not be accepted again."""
        accepted = self.accepted()
        for name, scorer in self.record.scorers.items():
            changed = now[name]["sha256"]
            if changed != accepted.get(name, scorer["sha256"]):
                append_line(
                    RunFolder(self.run).accepted,
                    json.dumps({"scorer": name, "sha256": changed, "was": scorer["sha256"]}),
                )

    @property
    def has_changed_scorers(self) -> bool:
        """Tells whether the run went on with a changed scorer once."""
        return bool(self.accepted())

    def accepted(self) -> dict[str, str]:
        """Returns the digest of each changed scorer that was accepted last, by its name."""
        file = RunFolder(self.run).accepted
        if not file.is_file():
            return {}
        rows = read_json_lines(file, cure="remove that line", skip_damaged=True)
        return {row["scorer"]: row["sha256"] for row in rows if "scorer" in row and "sha256" in row}


def owned_inputs(run: Path) -> OwnedInputs:
    """Reads what a run was made from.

    Raises: UserError where there is no run, or its inputs are damaged or of another version.
    """
    contents, file = read_contents(run), RunFolder(run).inputs
    try:
        tensors, content = read_whole(file)
        if content["sha256"] != contents.inputs:
            raise Torn(f"{file} is not the one that {RunFolder(run).config} names")
        record = unpack_file(file, RunInputs, tensors, content["record"])
    except FileNotFoundError as error:
        raise DamagedInputs(f"{file} is missing", run) from error
    except Torn as error:
        raise DamagedInputs(str(error), run) from error
    return OwnedInputs(run=run, contents=contents, record=record)


class DamagedInputs(UserError):
    """inputs.safetensors is missing or damaged; a resumed run restores it if nothing has changed outside."""

    def __init__(self, what: str, run: Path) -> None:
        super().__init__(f"{what}; go on with python -m engine.train --resume {run}, which restores it.")
        self.what = what


def restore_inputs(run: Path, contents: Contents, record: RunInputs, damage: DamagedInputs) -> OwnedInputs:
    """Writes a damaged inputs.safetensors again from what was read anew, if that is what the run began with.

    Raises: UserError where it is not.
    """
    paths = RunFolder(run)
    trial = paths.inputs.with_name(paths.inputs.name + ".again.tmp")
    checksum = save(trial, record, contents=contents.tree())
    if checksum != contents.inputs:
        trial.unlink()
        raise UserError(
            f"{damage.what}, and what the run read has changed since it began; put prompts, pairs, model and "
            "scorers back as they were, or start a new run with another --out."
        )
    move_aside(paths.inputs)
    trial.replace(paths.inputs)
    return OwnedInputs(run=run, contents=contents, record=record)


def source_digests(config: RunConfig) -> dict[str, dict[str, str]]:
    """Hashes the files of prompts, samples, pairs and preferences that a config names, by flag, also those in
    folders.

    Data sets that `datasets` finds, on a hub or elsewhere, are left out.
    """
    return {
        flag: {str(file): _digest(file) for file in files}
        for flag, name in _sources(config)
        if (files := files_of(name))
    }


def _sources(config: RunConfig) -> Iterator[tuple[str, str]]:
    named = {
        "--prompts": config.prompts,
        "--samples": config.samples,
        "--heldout": config.heldout,
        "--pairs": config.pairs_file,
        "--preferences": getattr(config, "preferences", ""),
        "--template": "" if config.template in TEMPLATES else config.template,
    }
    yield from ((flag, name) for flag, name in named.items() if name)


def copies(folder: Path, files: Iterable[str], template: str) -> dict[str, Path | str]:
    """Lists what a run keeps of the model's files by name: where each is read, or the text that it holds."""
    found: dict[str, Path | str] = {name: folder / name for name in files if is_copied(name)}
    return found | ({TEMPLATE_FILE: template} if template else {})


def is_copied(name: str) -> bool:
    """Tells whether a run keeps its own copy of a file of the model's folder: of all but the weights."""
    return name == "config.json" or not is_model(name)


def is_model(name: str) -> bool:
    """Tells whether a file of a folder is the model itself: weights, their index or their config."""
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))


def _holds(file: Path, text: str) -> bool:
    """Tells whether a file holds this text."""
    return is_file(file) and file.read_bytes() == text.encode()


def _digest(file: Path) -> str:
    """Hashes a file; "" where it cannot be read, or is none, as a pipe that nobody writes to."""
    try:
        return sha256_of_file(file) if is_file(file) else ""
    except OSError:
        return ""
