"""Says where a figure comes from: machine, versions, commit and date."""

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy", "trl",
    "llama-cpp-python", "vllm",
)  # fmt: skip


def origin(device: torch.device) -> dict[str, object]:
    """Returns the keys of a line of results that say where it was measured."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    changed = "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if device.type == "cuda" else "",
        "versions": versions,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD") + changed,
        "date": date.today().isoformat(),
    }


def _git(*arguments: str) -> str:
    return _output(["git", *arguments])


def _output(command: list[str]) -> str:
    """Returns what a command prints; nothing where the machine lacks it."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    wide = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else "no AVX"
    return f"{names[0] if names else platform.processor()} ({wide})"


def _driver() -> str:
    versions = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    return versions[0] if versions else ""
