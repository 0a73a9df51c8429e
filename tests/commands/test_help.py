"""--help of every command, and what is said of a mistyped flag, load nothing that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "scipy", "matplotlib", "transformers", "tokenizers", "rich", "kernels"}
COMMANDS = (
    "engine.train",
    "engine.train caid",
    "engine.train head",
    "engine.evaluate run",
    "engine.export run folder",
    "engine.sweep",
    "engine.dual scores.jsonl",
)


def run_python(*argv: str) -> tuple[int, str, set[str]]:
    """Runs python with `argv`; returns its exit code, what it prints and the modules that it imports."""
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return done.returncode, done.stdout + done.stderr, modules


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    name, *words = command.split()
    code, printed, modules = run_python("-m", name, *(words if name == "engine.train" else []), "--help")
    assert code == 0 and f"usage: python -m {name}" in printed
    assert "engine.command" in modules and not modules & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_is_told_before_anything_heavy_is_imported(command):
    code, printed, modules = run_python("-m", *command.split(), "--sed", "1")
    assert code == 2 and "error: unknown flag --sed" in printed
    assert not modules & HEAVY


@pytest.mark.parametrize("name", ["engine", "engine.dual"])
def test_a_package_loads_its_library_where_it_is_used(name):
    code, _, modules = run_python("-c", f"import {name}")
    assert code == 0 and name in modules and not modules & HEAVY
