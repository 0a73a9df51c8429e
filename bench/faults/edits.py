"""The six ways to damage a file."""

import random
import re
import shutil
from pathlib import Path

NOTE = "note.txt"
WAYS = ("emptied", "cut", "bit", "deleted", "folder", "edited")


def damage(path: Path, way: str, rng: random.Random) -> bool:
    """Damages a file. Returns whether it is another one now."""
    data = path.read_bytes()
    if way == "deleted":
        path.unlink()
        return True
    if way == "folder":
        path.unlink()
        path.mkdir()
        (path / NOTE).write_text("a note of the user\n")
        return True
    if way == "edited":
        return edit(path, data, rng)
    changed = {
        "emptied": lambda: b"",
        "cut": lambda: data[: len(data) // 2],
        "bit": lambda: flipped(data, rng),
    }
    new = changed[way]()
    path.write_bytes(new)
    return new != data


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with one bit flipped."""
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def edit(path: Path, data: bytes, rng: random.Random) -> bool:
    """Changes a number of a text, or a tensor of a safetensors file, so that the file reads as before.

    Returns whether there was anything to change.
    """
    if path.suffix == ".safetensors":
        return edit_tensors(path)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        path.write_bytes(data + b"\0")
        return True
    numbers = list(re.finditer(r"(?<![\w.])\d+(\.\d+)?(?![\w.])", text))
    if numbers:
        number = rng.choice(numbers)
        text = f"{text[: number.start()]}{changed_number(number[0])}{text[number.end() :]}"
    elif lines := text.splitlines(keepends=True):
        text = "".join([*lines, lines[-1]])
    path.write_text(text)
    return text.encode() != data


def changed_number(number: str) -> str:
    """Writes another number with as many digits."""
    last = number[-1]
    return number[:-1] + str((int(last) + 1) % 10)


def edit_tensors(path: Path) -> bool:
    """Multiplies the first tensor of floats by 3, and keeps the file's metadata."""
    import safetensors.torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    floats = [name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point() and tensor.any()]
    if not floats:
        return False
    tensors[floats[0]] = tensors[floats[0]] * 3
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    return True


def change_weights(folder: Path) -> None:
    """Flips one bit in the last half of a model's weights."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4 + 1] ^= 1
    path.write_bytes(data)


def copy_of(source: Path, target: Path) -> None:
    """Copies a folder in place of another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
