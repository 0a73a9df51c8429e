"""The ways in which what a run read is changed."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.faults.edits import change_weights, edit_tensors
from bench.faults.world import DATED, JUDGE, change_json, read_lines, write_lines


class Alteration(NamedTuple):
    """A change of one input."""

    change: Callable[[Path], None]  # of the working folder
    named: tuple[str, ...] = ()  # a refusal has to hold one of these
    refusable: bool = False  # the run cannot have its own copy, so a refusal is right
    acceptable: bool = True  # --accept-changes goes on with what is there now


def removed(file: str) -> Callable[[Path], None]:
    """Removes the third row."""
    return lambda work: write_lines(work / file, [*read_lines(work / file)[:2], *read_lines(work / file)[3:]])


def replaced(file: str) -> Callable[[Path], None]:
    """Replaces texts of the third row by ones of the same length."""

    def change(work: Path) -> None:
        rows = read_lines(work / file)
        rows[2] = {key: swap(value) if isinstance(value, str) else value for key, value in rows[2].items()}
        write_lines(work / file, rows)

    return change


def swap(text: str) -> str:
    """Returns the text with its last two letters in the other order, or others where they are equal."""
    ending = text[-1] + text[-2]
    return text[:-2] + (ending if ending != text[-2:] else "qx")


def relabelled(work: Path) -> None:
    """Turns all labels of the file of preferences round."""
    rows = read_lines(work / "preferences.jsonl")
    turned = [{**row, "reward": 1 - row["reward"], "harm": 1 - row["harm"]} for row in rows]
    write_lines(work / "preferences.jsonl", turned)


def added(file: str) -> Callable[[Path], None]:
    """Adds three rows in front."""

    def change(work: Path) -> None:
        rows = read_lines(work / file)
        new = [{**rows[0], "prompt": f"Is number {i} odd"} for i in range(3)]
        write_lines(work / file, [*new, *rows])

    return change


def tokenizer(work: Path) -> None:
    """Lets two letters of the vocabulary change places."""
    import json

    path = work / "model" / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = contents["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(contents), encoding="utf-8")


def template(folder: str, text: str) -> Callable[[Path], None]:
    """Writes another chat template."""

    def change(work: Path) -> None:
        file = work / folder / "chat_template.jinja"
        if file.is_file():
            file.write_text(text)
        change_json(work / folder / "tokenizer_config.json", "chat_template", text)

    return change


OTHER = DATED.replace("strftime_now('%d %b %Y')", "'another day'")
ALTERATIONS = {
    "tokenizer": Alteration(tokenizer),
    "template": Alteration(template("model", OTHER)),
    "template-dated": Alteration(template("dated", OTHER)),
    "generation": Alteration(lambda work: _generation(work / "model")),
    "weights": Alteration(lambda work: change_weights(work / "model"), ("model",), refusable=True),
    "other-version": Alteration(lambda work: None),
    "tomorrow": Alteration(lambda work: None),
    "head": Alteration(
        lambda work: edit_tensors(work / "heads" / "harm" / "head.safetensors"), ("harm",), refusable=True
    ),
    "head-deleted": Alteration(
        lambda work: (work / "heads" / "harm" / "head.safetensors").unlink(),
        ("harm",),
        True,
        acceptable=False,
    ),
    "classifier": Alteration(
        lambda work: change_weights(work / "classifier"), ("classifier", "unfriendly"), refusable=True
    ),
    "classifier-template": Alteration(
        template("classifier", OTHER), ("classifier", "unfriendly"), refusable=True
    ),
    "scorer": Alteration(
        lambda work: (work / "judge.py").write_text(JUDGE.replace("len(set(r))", "10 * len(r)")),
        ("judge", "letters"),
        refusable=True,
    ),
    "scorer-deleted": Alteration(
        lambda work: (work / "judge.py").unlink(), ("judge", "letters"), refusable=True, acceptable=False
    ),
    "preferences-relabelled": Alteration(relabelled),
}
for _name in ("prompts", "heldout", "pairs", "preferences"):
    _file = f"{_name}.jsonl"
    ALTERATIONS |= {
        f"{_name}-removed": Alteration(removed(_file)),
        f"{_name}-same-length": Alteration(replaced(_file)),
        f"{_name}-added": Alteration(added(_file)),
        f"{_name}-deleted": Alteration(lambda work, file=_file: (work / file).unlink()),
    }


def _generation(folder: Path) -> None:
    """Lets a frequent letter end a response."""
    import json

    path = folder / "generation_config.json"
    contents = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**contents, "eos_token_id": [2, 70, 71, 72, 73]}))
