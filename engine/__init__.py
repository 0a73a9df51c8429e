"""Constrained alignment of language models: roll out, score, pair, update, descend the dual."""

import sys
from importlib.util import find_spec
from pathlib import Path

_expected = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
_spec = find_spec("kernels")
_found = Path(_spec.origin).resolve() if _spec is not None and _spec.origin else None
if _found is None or _found.parent.parent != _expected.parent.parent:
    _message = (
        f"dualign needs its own package 'kernels' at {_expected.parent}, but python finds {_found}. "
        "Cure: pip uninstall kernels, then pip install dualign again."
    )
    # While `python -m engine.NAME` looks for its module, argv[0] is "-m": a command says this in one line.
    if sys.argv[:1] == ["-m"]:
        print(f"error: {_message}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_message)
