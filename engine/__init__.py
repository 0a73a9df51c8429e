"""Constrained alignment of language models: roll out, score, pair, update, descend the dual."""

import sys
from importlib.util import find_spec
from pathlib import Path

# While `python -m engine.NAME` looks for its module, argv[0] is "-m". From then on it ends in one line,
# also where it is stopped while its modules are imported.
_is_command = sys.argv[:1] == ["-m"] and "engine." in sys.orig_argv[-len(sys.argv)]
_expected = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
_spec = find_spec("kernels")
_found = Path(_spec.origin).resolve() if _spec is not None and _spec.origin else None
if _found is None or _found.parent.parent != _expected.parent.parent:
    _message = (
        f"dualign needs its own package 'kernels' at {_expected.parent}, but python finds {_found}. "
        "Cure: pip uninstall kernels, then pip install dualign again."
    )
    if _is_command:
        print(f"error: {_message}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_message)

if _is_command:
    from engine.command import end_imports

    sys.excepthook = end_imports
