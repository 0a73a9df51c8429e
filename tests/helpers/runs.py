"""Whole smoke runs: their flags, and the files that they leave and read."""

import json
from pathlib import Path

SMOKE = ["--preset", "smoke", "--threads", "1"]


def files(folder: Path) -> dict[str, bytes]:
    """Reads every file of a run but its lock and its times; returns the bytes by relative path."""
    kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "timing.jsonl")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
