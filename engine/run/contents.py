"""config.json of a run folder, and the copy of it in inputs.safetensors."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import move_aside, write_whole
from engine.run.folder import RunFolder
from engine.run.store import Torn, dumps, pack, read_whole, save, sha256_of, unpack


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Holds what config.json says of a run."""

    algorithm: str
    config: dict  # sequences are tuples
    fingerprint: str  # of the model
    versions: dict
    inputs: str  # SHA-256 of inputs.safetensors, with which the chain of stages begins

    def tree(self) -> dict:
        """Returns what config.json and inputs.safetensors both hold, as JSON."""
        return {
            "algorithm": self.algorithm,
            "config": pack(_lists(self.config))[1],
            "fingerprint": self.fingerprint,
            "versions": self.versions,
        }


def write_contents(
    folder: Path, algorithm: str, config: dict, *, fingerprint: str, versions: dict, inputs: Any
) -> Contents:
    """Writes inputs.safetensors, with a copy of the other values, and then config.json.

    So a folder that has config.json is complete. inputs: a record, as `engine.run.store.save` takes it.
    Raises: UserError on a full or closed disk.
    """
    paths = RunFolder(folder)
    contents = Contents(
        algorithm=algorithm, config=tuples(config), fingerprint=fingerprint, versions=versions, inputs=""
    )
    checksum = save(paths.inputs, inputs, contents=contents.tree())
    _write_config(paths, contents.tree(), checksum)
    return replace(contents, inputs=checksum)


def read_contents(folder: Path) -> Contents:
    """Reads config.json.

    Where it is damaged, missing or changed, it is restored from its copy, and stderr says so.

    Raises: UserError where there is no run, or neither of the two is whole.
    """
    paths = RunFolder(folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; name the folder that --out made")
    try:
        tree = json.loads(paths.config.read_text(encoding="utf-8"))
        checksum = tree.pop("sha256")
        if sha256_of({}, dumps(tree)) != checksum:
            raise Torn("was changed after the run began")
        return _contents(tree, tree["inputs"])
    except FileNotFoundError:
        reason = "is missing"
    except Torn as error:
        reason = str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"cannot be read ({type(error).__name__})"
    try:
        _, content = read_whole(paths.inputs)
        tree, checksum = content["contents"], content["sha256"]
        contents = _contents(tree, checksum)
    except FileNotFoundError as error:
        if reason == "is missing":
            raise UserError(
                f"{folder} has no config.json, so it is no run folder or its run never began; start "
                "with another --out"
            ) from error
        raise UserError(f"{paths.config} {reason}; start a new run with another --out") from error
    except (Torn, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{paths.config} {reason}, and so is its copy in {paths.inputs}; start a new run with another "
            "--out"
        ) from error
    _write_config(paths, tree, checksum)
    print(f"{paths.config} {reason}: restored from {paths.inputs}", file=sys.stderr)
    return contents


def _contents(tree: dict, inputs: str) -> Contents:
    return Contents(
        algorithm=tree["algorithm"],
        config=tuples(unpack(dict, {}, tree["config"])),
        fingerprint=tree["fingerprint"],
        versions=tree["versions"],
        inputs=inputs,
    )


def _write_config(paths: RunFolder, tree: dict, checksum: str) -> None:
    whole = {**tree, "inputs": checksum}
    whole["sha256"] = sha256_of({}, dumps(whole))
    move_aside(paths.config)
    text = json.dumps(whole, sort_keys=True, allow_nan=False, indent=1)
    write_whole(paths.config, (text + "\n").encode())


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def tuples(value: Any) -> Any:
    """Turns every list in a tree of JSON into a tuple, as configs hold them."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list | tuple) else value
