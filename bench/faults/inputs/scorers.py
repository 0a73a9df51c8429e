"""Scorers that misbehave: modules that do not load, scores that are none, traces left behind; and heads."""

import json
from collections.abc import Iterator
from pathlib import Path

from bench.faults.inputs.malformed import Malformed, with_flags

HEAD = (
    "def f(prompts, responses):\n    n = len(responses)\n"
    "    good = [float(sum(map(ord, r)) % 25) for r in responses]\n"
)
REFUSED_MODULES = {
    "syntax": "def f(:\n",
    "import": "import no_such_module\n",
    "value": "raise ValueError('no key')\n",
    "silent": "raise RuntimeError\n",
    "exit": "import sys\nsys.exit(0)\n",
    "no-function": "g = 1\n",
    "number": "f = 5\n",
    "recursion": "def f(p, r):\n    return f(p, r)\n",
    "class": "class f:\n    pass\n",
    "nul": "\0",
    "import-exit": "raise SystemExit('stop')\n",
    "arguments": "def f(p):\n    return [1.0] * len(p)\n",
}
REFUSED_BODIES = {
    "none": "return None",
    "text": "return 'a' * n",
    "few": "return good[:-1]",
    "many": "return good + [1.0]",
    "nested": "return [[x] for x in good]",
    "dict": "return dict(enumerate(good))",
    "set": "return set(range(n))",
    "bytes": "return bytes(n)",
    "nan": "return [float('nan')] * n",
    "infinite": "return [float('inf')] * n",
    "complex": "return [complex(x, 1) for x in good]",
    "texts": "return [str(x) for x in good]",
    "nones": "return [None] * n",
    "constant": "return [1.0] * n",
    "huge": "return [1e308 * (x - 12) for x in good]",
    "huge-integers": "return [10 ** 400] * n",
    "endless": "import itertools\n    return itertools.count()",
    "coroutine": "async def g():\n        return good\n    return g()",
    "scalar": "return 3.5",
    "function": "return f",
    "raises": "raise RuntimeError('the judge is away')",
    "raises-nothing": "raise RuntimeError",
    "raises-lines": "raise RuntimeError('\\n\\n  the judge\\nis away')",
    "exit": "raise SystemExit(0)",
    "exit-code": "import sys\n    sys.exit(3)",
    "stop": "raise StopIteration",
    "generator-exit": "raise GeneratorExit",
    "raising-generator": "return (1 / 0 for x in good)",
    "memory": "raise MemoryError",
    "matrix": "import torch\n    return torch.ones(n, 2)",
    "text-array": "import numpy\n    return numpy.array(['a'] * n)",
    "infinite-recursion": "return f(prompts, responses)",
    "surrogate": "raise ValueError('\\ud800')",
    "base-exception": "class Odd(BaseException):\n        pass\n    raise Odd('odd')",
    "bad-str": "class O(Exception):\n        def __str__(self):\n            raise ValueError\n    raise O",
}
# Scores that are good, and what is left behind: the run is as if nothing had happened.
ACCEPTED_BODIES = {
    "tuple": "return tuple(good)",
    "generator": "return (x for x in good)",
    "array": "import numpy\n    return numpy.array(good)",
    "tensor": "import torch\n    return torch.tensor(good)",
    "integers": "return [int(x) for x in good]",
    "chdir": "import os\n    os.chdir('/')\n    return good",
    "dtype": "import torch\n    torch.set_default_dtype(torch.float64)\n    return good",
    "no-grad": "import torch\n    torch.set_grad_enabled(False)\n    return good",
    "print": "print('hello')\n    return good",
    "stdout": "import sys\n    sys.stdout = None\n    return good",
    "reverse": "prompts.reverse()\n    responses.clear()\n    return good",
    "seed": "import random, torch\n    torch.manual_seed(0)\n    random.seed(0)\n    return good",
    "threads": "import torch\n    torch.set_num_threads(2)\n    return good",
    "child": "import os\n    pid = os.fork()\n    pid or os._exit(0)\n    os.wait()\n    return good",
    "signal": "import signal\n    signal.signal(signal.SIGINT, signal.SIG_DFL)\n    return good",
    "warns": "import warnings\n    warnings.warn('odd')\n    return good",
}
SPECS = (
    "judge:",
    ":letters",
    ":",
    "judge:nothing",
    "nomodule:f",
    ".a:f",
    "judge.letters:f",
    "judge:letters:f",
    "",
    "no-such-head",
    "nobody/nothing",
    "=",
    "a=",
    "=harm",
    "reward=harm",
    "-harm",
    "a=--harm",
    "model",
    "judge.py",
    "prompts.jsonl",
    "heads",
    "classifier#nothing",
    "classifier#",
    "os:system",
    "json:dumps",
    "n" * 300,
    "a\nb",
    "judge:letters\udcff",
    "~/heads/harm",
    "//",
    "harm=harm=harm",
    "builtins:open",
)


def cases() -> Iterator[Malformed]:
    """Lists modules, functions, specifications and heads."""
    for name, text in REFUSED_MODULES.items():
        yield _module(f"scorer-modules/{name}", text)
    for name, body in REFUSED_BODIES.items():
        yield _module(f"scorer-values/{name}", f"{HEAD}    {body}\n")
    for name, body in ACCEPTED_BODIES.items():
        yield _module(f"scorer-traces/{name}", f"{HEAD}    {body}\n", accepts=True)
    for spec in SPECS:
        shown = spec[:20].encode("ascii", "backslashreplace").decode().replace("/", "|").replace("\n", "|")
        fine = spec in ("a\nb", "classifier#")
        yield Malformed(f"scorer-names/{shown or 'empty'}", with_flags("--cost", spec), accepts=fine)
    yield from _heads()


def _module(name: str, text: str, accepts: bool = False) -> Malformed:
    words = with_flags("--cost", "odd=guest:f")
    return Malformed(
        name, words, lambda work: (work / "guest.py").write_text(text), ("odd", "guest"), accepts
    )


def _heads() -> Iterator[Malformed]:
    """Lists head files whose weights or words are no head's."""

    def head(
        name: str, change: dict | None = None, weight=None, accepts: bool = False, raw=None
    ) -> Malformed:
        def write(work: Path) -> None:
            write_head(work / "heads" / "harm" / "head.safetensors", change or {}, weight, raw)

        words = with_flags("--cost", "heads/harm")
        return Malformed(f"heads/{name}", words, write, ("harm", "head.safetensors"), accepts)

    yield head("empty", raw=b"")
    yield head("zeros", raw=bytes(100))
    yield head("json", raw=b'{"weight": [1, 2]}')
    for name, layer in {
        "text": "two",
        "far": 99,
        "negative": -1,
        "list": [2],
        "none": None,
        "half": 1.5,
    }.items():
        yield head(f"layer-{name}", {"layer": layer})
    for name, bias in {"text": "big", "nan": float("nan"), "list": [0.0], "none": None}.items():
        yield head(f"bias-{name}", {"bias": bias})
    yield head("bias-huge", {"bias": 1e308}, accepts=True)
    for name, word in {"number": 5, "list": [], "none": None, "empty": ""}.items():
        yield head(f"name-{name}", {"name": word})
    yield head("name-dots", {"name": "harm.v2"}, accepts=True)
    yield head("name-slash", {"name": "a/../b"}, accepts=True)
    yield head("name-long", {"name": "n" * 5000}, accepts=True)
    yield head("name-lines", {"name": "a\nb"}, accepts=True)
    yield head("name-formula", {"name": "=HYPERLINK(1)"}, accepts=True)
    for name, trunk in {"number": 5, "none": None}.items():
        yield head(f"trunk-{name}", {"trunk": trunk})
    yield head("more-words", {"colour": "red"})
    yield head("no-words", {"name": ...})
    for name, shape in {"matrix": (32, 1), "short": (31,), "long": (33,), "scalar": (), "none": (0,)}.items():
        yield head(f"weight-{name}", weight=("ones", shape))
    for name in ("zeros", "nan", "infinite", "integers"):
        yield head(f"weight-{name}", weight=(name, (32,)), accepts=name == "integers")


def write_head(path: Path, change: dict, weight: tuple | None, raw: bytes | None) -> None:
    """Writes a head with other words, other weights, or other bytes."""
    import safetensors.torch
    import torch
    from safetensors import safe_open

    if raw is not None:
        path.write_bytes(raw)
        return
    with safe_open(path, framework="pt") as stored:
        about, tensor = json.loads(stored.metadata()["head"]), stored.get_tensor("weight")
    about = {key: value for key, value in (about | change).items() if value is not ...}
    if weight is not None:
        kind, shape = weight
        fill = {"ones": 1.0, "zeros": 0.0, "nan": float("nan"), "infinite": float("inf"), "integers": 1}[kind]
        tensor = torch.full(shape, fill)
    data = safetensors.torch.save({"weight": tensor}, metadata={"head": json.dumps(about)})
    path.write_bytes(data)
