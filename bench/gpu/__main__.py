"""What only a GPU can say, in six parts of under nine minutes each: `python -m bench.gpu --part N --out FOLDER`.

Each step of a part leaves one JSON line in FOLDER/part-N.jsonl when it ends, so that the same command goes on where it was cut off; a step
that failed leaves its error and is tried again after the others. `python -m bench.gpu --out FOLDER` adds the figures found so far to
bench/results.jsonl and writes bench/RESULTS.md anew.
"""

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
import tyro
from torch import Tensor

from bench.run import __main__ as run
from bench.run import floors
from bench.run.measure import interleaved, origin
from engine.attention import Layout, attend_packed
from engine.checkpoint import write_whole
from kernels import sample, triton_decode, triton_forward, triton_rows
from kernels.decode_attention import decode_attention

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 8.5 * 60  # no step begins that is thought to end later
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """One thing to find out; `seconds` is a guess, from which it is decided whether it still fits."""

    name: str
    seconds: float
    lines: Callable[[torch.device], list[dict]]


def table(title: str, header: list[str], rows: list[list], notes: tuple[str, ...] = (), *, device: torch.device) -> dict:
    """A line of results.jsonl that is shown as it stands; numbers with four digits."""
    return {"case": "table", "shape": title, "header": header, "table": rows, "notes": list(notes), **origin(device)}


def per_call(call: Callable[[int], object], calls: int, device: torch.device, repeats: int = 15) -> float:
    """Median seconds of one of call(0), ..., call(calls - 1): on a GPU replayed from one captured graph, so that no launch waits for the
    host."""
    if device.type != "cuda":
        return interleaved({"": lambda: [call(i) for i in range(calls)]}, repeats, device)[""]["median"] / calls
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(calls):
            call(i)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return interleaved({"": graph.replay}, repeats, device)[""]["median"] / calls


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy of more than any cache holds, read and written ones."""
    probe = floors.probes(BF16, device)["copy"]
    return probe.bytes / per_call(lambda i: probe.step(), 4, device)


# Part 1: bare products, and the loss head against its rivals.


def ceilings(device: torch.device, rows: int = 8192, width: int = 4096, vocabulary: int = 151936, side: int = 8192) -> list[dict]:
    """What the card gives: a copy, a square product, and the three products of a loss head with float32 output and with 16-bit output."""
    found = []
    copied = floors.probes(BF16, device)["copy"]
    s = per_call(lambda i: copied.step(), 4, device)
    found.append(["copy, GB/s", 1000 * s, copied.bytes / s / 1e9])
    hidden, weight, z = (torch.randn(n, m, device=device).to(BF16) for n, m in ((rows, width), (vocabulary, width), (rows, vocabulary)))
    a, b = (torch.randn(side, side, device=device).to(BF16) for _ in range(2))
    products = {
        f"{side} x {side} x {side}": (a, b),
        "logits, H W'": (hidden, weight.t()),
        "dH, G W": (z, weight),
        "dW, G' H": (z.t(), hidden),
    }
    for kind in (torch.float32, BF16):
        total_s = total = 0.0
        for name, (left, right) in products.items():
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            out = torch.empty(left.shape[0], right.shape[1], dtype=kind, device=device)
            s = per_call(lambda i, left=left, right=right, out=out: product(left, right, out), 4, device)
            found.append([f"{name}, {str(kind).removeprefix('torch.')} output, Tflop/s", 1000 * s, flops / s / 1e12])
            if left is not a:
                total_s, total = total_s + s, total + flops
            del out
        found.append([f"the three, {str(kind).removeprefix('torch.')} output, Tflop/s", 1000 * total_s, total / total_s / 1e12])
    title = f"Ceilings: bfloat16 products of random numbers, loss head of {rows} rows x {width} x {vocabulary}"
    return [table(title, ["", "ms", "rate"], found, device=device)]


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def loss_head(shape: str, rows: int = 8192, **options) -> Step:
    """`bench.run loss_head` in bfloat16."""
    name = f"loss_head {shape} {rows}{' frozen' if options.get('frozen') else ''}"
    config = {"shape": shape, "rows": rows, "dtype": "bfloat16", "repeats": 7, "save": False} | options
    return Step(name, 25, lambda device: [run.run_loss_head(run.LossHead(**config, device=str(device)))])


# Part 2: the tests.


def tests(name: str, seconds: float, arguments: list[str], tool: tuple[str, ...] = ()) -> Step:
    """Run pytest, maybe under compute-sanitizer, and count."""

    def lines(device: torch.device, folder: Path = Path("/tmp")) -> list[dict]:
        report = folder / f"{name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        begun = time.monotonic()
        command = [*tool, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        # The sanitizer sees a tensor's bounds only where each has memory of its own.
        bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | bare)
        rows, notes = counted(report)
        rows = [[name, ended.returncode, *rows, time.monotonic() - begun]]
        return [table(f"Tests: {name}", ["", "exit code", "passed", "failed", "skipped", "s"], rows, notes, device=device)]

    return Step(name, seconds, lines)


def counted(report: Path) -> tuple[list[int], tuple[str, ...]]:
    """(passed, failed, skipped) of a JUnit report, and what is said of it: each failure, and how many were skipped for each reason."""
    passed, failed, reasons = 0, [], {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            failed.append(f"failed: {case.get('classname')}::{case.get('name')}: {(problem.get('message') or '').splitlines()[:1]}")
        elif skipped is not None:
            reasons[skipped.get("message")] = reasons.get(skipped.get("message"), 0) + 1
        else:
            passed += 1
    return [passed, len(failed), sum(reasons.values())], (*failed, *(f"{count} skipped: {reason}" for reason, count in reasons.items()))


# Part 3: what was not known without a GPU.


def attention_kernels(device: torch.device, groups: int = 32, prompt: int = 256, response: int = 64) -> list[dict]:
    """Packed attention by runs (GQA, runs with more keys than queries) against float64 on the grid: errors and times, both passes."""
    found = []
    small = Layout.shared_prompt([37, 5], [[9, 0, 20], [3]])
    large = Layout.shared_prompt([prompt] * groups, [[response] * 8] * groups)
    for heads, kv_heads, width in ((14, 2, 64), (32, 8, 64), (12, 2, 128)):
        names = ("out", "dQ", "dK", "dV")
        got, exact = (attention_pass(small, heads, kv_heads, width, kind, device) for kind in (BF16, torch.float64))
        errors = {n: float((g.double() - e).abs().max() / e.abs().max()) for n, g, e in zip(names, got, exact, strict=True)}
        step = attention_step(large.to(device), heads, kv_heads, width, BF16, device)
        times = interleaved({"": step}, 10, device)[""]
        found.append([f"{heads} / {kv_heads} heads of {width}", *errors.values(), 1000 * times["median"]])
    tokens = groups * (prompt + 8 * response)
    title = f"Packed attention in bfloat16: largest relative errors against float64; ms of both passes over {tokens} tokens"
    return [table(title, ["", *names, "ms"], found, device=device)]


def attention_step(
    layout: Layout, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], list[Tensor]]:
    """[out, dQ, dK, dV] of packed attention on seeded random numbers."""
    g, tokens = torch.Generator().manual_seed(0), len(layout.position)
    leaves = [torch.randn(tokens, n, width, generator=g).to(BF16).to(device, dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(tokens, heads, width, generator=g).to(BF16).to(device, dtype)

    def step() -> list[Tensor]:
        out = attend_packed(*leaves, layout, None, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    return step


def attention_pass(layout: Layout, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One `attention_step`, in float64 on the CPU."""
    where = torch.device("cpu") if dtype == torch.float64 else device
    return [x.cpu() for x in attention_step(layout.to(where), heads, kv_heads, width, dtype, where)()]


def launches(device: torch.device, calls: int = 500) -> list[dict]:
    """Time between small kernels, launched by the host and replayed from a graph."""
    x = torch.zeros(64, device=device)
    eager = interleaved({"": lambda: [x.add_(1) for _ in range(calls)]}, 10, device)[""]["median"] / calls
    rows = [["launched by the host", 1e6 * eager], ["in a captured graph", 1e6 * per_call(lambda i: x.add_(1), calls, device)]]
    return [table("Time of a kernel of 64 numbers", ["", "us"], rows, device=device)]


def decode(device: torch.device, prompts: int = 32, longest: int = 256, room: int = 512, layers: int = 8) -> list[dict]:
    """GB/s of decode attention at the shapes of published models, bytes as its docstring counts them. Layers take turns, so that caches
    miss."""
    found, copied = [], copy_rate(device)
    for shape, heads, kv_heads, width in (
        ("qwen2.5-0.5b", 14, 2, 64), ("llama-3.2-1b", 32, 8, 64), ("qwen2.5-1.5b", 12, 2, 128), ("llama-3.1-8b", 32, 8, 128)
    ):  # fmt: skip
        for used in (1, room // 2, room):
            data = [decode_problem(prompts, 8, longest, room, used, heads, kv_heads, width, device) for _ in range(layers)]
            s = per_call(lambda i, data=data: decode_attention(**data[i]), layers, device)
            moved = 2 * kv_heads * width * 2 * (prompts * longest + prompts * 8 * used)
            found.append([shape, used, 1e6 * s, moved / s / 1e9, 100 * moved / s / copied])
            del data
    title = f"Decode attention, {prompts} prompts of {longest} x 8 rows, bfloat16"
    return [table(title, ["shape", "own tokens", "us", "GB/s", "% of a copy"], found, device=device)]


def decode_problem(
    prompts: int, n: int, longest: int, room: int, used: int, heads: int, kv_heads: int, width: int, device: torch.device
) -> dict[str, Tensor]:
    """Arguments of `decode_attention` in bfloat16."""
    rows = prompts * n
    shapes = {
        "query": (rows, heads, width),
        "prompt_keys": (prompts, kv_heads, longest, width), "prompt_values": (prompts, kv_heads, longest, width),
        "own_keys": (rows, kv_heads, room, width), "own_values": (rows, kv_heads, room, width),
    }  # fmt: skip
    data = {name: torch.randn(shape, device=device, dtype=BF16) for name, shape in shapes.items()}
    whole = {"prompt_length": [longest] * prompts, "owner_offsets": [n * p for p in range(prompts + 1)], "used": [used]}
    return data | {name: torch.tensor(values, device=device) for name, values in whole.items()}


def sampling(device: torch.device, rows: int = 256) -> list[dict]:
    """One token per row from real vocabularies: the logits are read once."""
    found, key = [], torch.arange(rows, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    for columns, dtype in itertools.product((49152, 151936), (torch.float32, BF16)):
        logits = 3 * torch.randn(rows, columns, device=device).to(dtype)
        for options in ({}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9}):
            s = per_call(lambda i, x=logits, o=options: sample(x, key=key, step=step, **o), 3, device)
            what = f"{rows} x {columns}, {str(dtype).removeprefix('torch.')}, {options or 'plain'}"
            found.append([what, 1000 * s, logits.nbytes / s / 1e9])
    return [table("Sampling", ["", "ms", "GB/s of logits"], found, device=device)]


# Part 4: configurations.


def row_tiles(device: torch.device, rows: int = 8192, vocabulary: int = 151936) -> list[dict]:
    """The row kernel on float32 logits, J in bfloat16: blocks and warps."""
    logits = torch.randn(rows, vocabulary, device=device)
    jacobian = torch.empty(rows, vocabulary, dtype=BF16, device=device)
    target = torch.randint(vocabulary, (rows,), device=device)
    logprob, scale = torch.empty(2, rows, device=device)
    moved, copied, found = 10 * rows * vocabulary, copy_rate(device), []
    for block, warps in itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16, 32)):
        if not 64 <= block // warps <= 1024:
            continue
        s = per_call(
            lambda i, block=block, warps=warps: triton_rows.row_kernel[(rows,)](
                logits, jacobian, logits, target, logprob, scale, vocabulary, vocabulary, vocabulary, 1.0, 1.0, HAS_BIAS=False,
                HAS_SOFTCAP=False, JACOBIAN=True, BLOCK_V=block, num_warps=warps,
            ), 2, device,
        )  # fmt: skip
        chosen = block == triton_rows.TritonRows.MAX_BLOCK and warps == 8
        found.append([block, warps, 1000 * s, moved / s / 1e9, 100 * moved / s / copied, "chosen" * chosen])
    title = f"Row kernel, {rows} x {vocabulary}: two reads of float32 logits, one write of bfloat16"
    return [table(title, ["block", "warps", "ms", "GB/s", "% of a copy", ""], found, device=device)]


HEADS = ((576, 49152), (896, 151936), (1024, 151936), (1536, 151936), (2048, 128256), (4096, 128256))


def forward_tiles(device: torch.device, rows: int = 8192, heads: tuple[tuple[int, int], ...] = HEADS) -> list[dict]:
    """Log-probs without gradients: the kernel that stores no logits, in several tiles, against cuBLAS's logits and the row kernel."""
    tiles = (
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (64, 256, 64, 4, 3),
        (128, 128, 32, 8, 4),
    )
    stored, found = "stored logits, row kernel", []
    for width, vocabulary in heads:
        hidden, weight = (torch.randn(n, width, device=device).to(BF16) / width**0.25 for n in (rows, vocabulary))
        target, out = torch.randint(vocabulary, (rows,), device=device), torch.empty(rows, device=device)
        logits = torch.empty(rows, vocabulary, dtype=BF16, device=device)
        bare = per_call(lambda i, h=hidden, w=weight, z=logits: torch.mm(h, w.t(), out=z), 3, device)
        del logits
        sizes = triton_rows.TritonRows.sizes(weight, None, None, rows, 1 << 62, "kept")
        work = triton_rows.TritonRows(weight, None, 1.0, None, sizes, rows, "kept")
        ways = {stored: lambda i, w=work, h=hidden, y=target: w._logprob(h, y, w.logits, False)}
        for blocks in tiles:
            ways[_without(blocks)] = lambda i, b=blocks, h=hidden, w=weight, y=target, o=out: triton_forward.token_logprob(
                h, w, None, y, 1.0, None, triton_forward.Blocks(*b), o
            )
        chosen = triton_forward.blocks_for(width, BF16)
        chosen = stored if chosen is None else _without(chosen)
        for name, way in ways.items():
            s = per_call(way, 3, device)
            found.append([f"{width} x {vocabulary}", name, 1000 * s, 100 * bare / s, "chosen" * (name == chosen)])
        del hidden, weight, work, ways
    title = f"Log-probs of {rows} rows without gradients, bfloat16"
    return [table(title, ["head", "", "ms", "% of the bare product", ""], found, device=device)]


def _without(blocks: tuple[int, ...]) -> str:
    return "no stored logits, " + "x".join(map(str, blocks))


def decode_tiles(device: torch.device, prompts: int = 32, longest: int = 256, room: int = 512, layers: int = 8) -> list[dict]:
    """Decode attention at Qwen2.5-1.5B's shape: tiles of both passes and parts of a prompt."""
    heads, kv_heads, width, used = 12, 2, 128, room // 2
    data = [decode_problem(prompts, 8, longest, room, used, heads, kv_heads, width, device) for _ in range(layers)]
    group = heads // kv_heads
    chosen = triton_decode.prompt_tiles(width, BF16, 8 * group), triton_decode.own_tiles(width, BF16, group)
    options, found = {"scale": None, "softcap": None, "window": None}, []
    shared_tiles = (16, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2), (64, 128, 8, 2)
    own_tiles = (16, 64, 4, 3), (16, 32, 4, 4), (16, 128, 4, 3), (16, 64, 2, 4)
    for shared, own, parts in itertools.product(shared_tiles, own_tiles, (1, 2, 4)):
        tiles = {"shared": triton_decode.Tiles(*shared), "own": triton_decode.Tiles(*own), "parts": parts}
        s = per_call(lambda i, tiles=tiles: triton_decode.decode_attention(**data[i], **options, **tiles), layers, device)
        found.append(["x".join(map(str, shared)), "x".join(map(str, own)), parts, 1e6 * s, "chosen" * ((shared, own) == chosen)])
    title = (
        f"Decode attention, {prompts} prompts of {longest} x 8 rows of {used} own tokens, {heads} / {kv_heads} heads of {width}, bfloat16"
    )
    return [table(title, ["prompts: queries x tokens x warps x stages", "own", "parts", "us", ""], found, device=device)]


# Parts 5 and 6: the engine.


def rollout(shape: str, **options) -> Step:
    """`bench.run rollout` in bfloat16."""
    config = {"shape": shape, "rows": 256, "prompt": 256, "new": 512, "dtype": "bfloat16", "repeats": 1, "save": False} | options
    seconds = 110 if config.get("rivals", True) else 20
    return Step(f"rollout {shape}", seconds, lambda device: [run.run_rollout(run.Rollout(**config, device=str(device)))])


def train_step(shape: str, tune: str, **options) -> Step:
    """`bench.run train_step` in bfloat16."""
    config = {"shape": shape, "tune": tune, "pairs": 32, "prompt": 256, "response": 256, "dtype": "bfloat16", "save": False} | options
    return Step(f"train_step {shape} {tune}", 60, lambda device: [run.run_train_step(run.TrainStep(**config, device=str(device)))])


def iteration(shape: str, **options) -> Step:
    """`bench.run iteration` in bfloat16."""
    config = {"shape": shape, "steps": 4, "prompts": 64, "new": 128, "dtype": "bfloat16", "save": False} | options
    return Step(f"iteration {shape}", 100, lambda device: [run.run_iteration(run.Iteration(**config, device=str(device)))])


MEMCHECK, RACECHECK = (("compute-sanitizer", "--tool", tool, "--error-exitcode", "9") for tool in ("memcheck", "racecheck"))
SMALL = "(211 and 8) or (attention_against and 64-9-3 and bfloat16) or (sampling_is and 5003) or forward_only"
PARTS: dict[int, tuple[str, list[Step]]] = {
    1: ("bare products and the loss head", [
        Step("ceilings", 30, ceilings),
        loss_head("qwen3-8b", budgets_mb=(3000,)), loss_head("qwen3-8b", frozen=True), loss_head("qwen2.5-0.5b"),
        loss_head("smollm2-135m"), loss_head("llama-3.2-1b"), loss_head("llama-3.1-8b"), loss_head("llama-3.1-8b", rows=1024),
        loss_head("qwen2.5-0.5b", rows=16384),
    ]),
    2: ("tests", [
        tests("GPU tests", 150, ["-n0", "tests/test_gpu.py"]),
        tests("memcheck", 60, ["-n0", "tests/test_gpu.py", "-k", SMALL], MEMCHECK),
        tests("racecheck", 60, ["-n0", "tests/test_gpu.py", "-k", SMALL], RACECHECK),
        tests("all others", 130, ["-n8", "--maxprocesses=8", "--ignore=tests/test_gpu.py"]),
    ]),
    3: ("what was not known", [
        Step("packed attention", 25, attention_kernels), Step("launches", 10, launches), Step("decode attention", 40, decode),
        Step("sampling", 25, sampling),
    ]),
    4: ("configurations", [
        Step("row kernel", 40, row_tiles), Step("forward without gradients", 60, forward_tiles), Step("decode tiles", 60, decode_tiles),
    ]),
    5: ("rollout and training step", [
        rollout("qwen2.5-0.5b"), train_step("qwen2.5-1.5b", "full"), rollout("qwen2.5-1.5b"), train_step("qwen2.5-0.5b", "lora"),
        rollout("llama-3.2-1b", rivals=False),
    ]),
    6: ("whole iterations", [iteration("qwen2.5-0.5b"), iteration("llama-3.2-1b")]),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure one part on a GPU, or add what was found to bench/RESULTS.md."""

    out: Path
    """Folder of the JSON lines."""
    part: int = 0
    """1: bare products and the loss head, 2: tests, 3: what was not known, 4: configurations, 5: rollout and training step, 6: whole
    iterations; 0 adds what the folder holds to bench/results.jsonl and bench/RESULTS.md."""


def go_on(steps: list[Step], path: Path, device: torch.device, limit_s: float = LIMIT_S) -> int:
    """Run the steps that `path` does not hold yet, those that failed last, at least one; returns how many are still to be done."""
    begun, records = time.monotonic(), _records(path)
    failed = [r["step"] for r in records if "failed" in r]
    done = {r["step"] for r in records if "lines" in r}
    todo = sorted((s for s in steps if s.name not in done), key=lambda s: s.name in failed)
    left = len(todo)
    for number, step in enumerate(todo):
        if number and time.monotonic() - begun + step.seconds > limit_s:
            print(f"{step.name}: about {step.seconds:.0f} s, which do not fit any more; the same command goes on with it")
            break
        record = _tried(step, device)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{step.name}: {record.get('failed', 'done').splitlines()[-1]} after {record['seconds']:.0f} s", flush=True)
        left -= "lines" in record
        if "CUDA error" in record.get("failed", ""):
            print("the GPU takes no more from this process; the same command goes on with the next step")
            break
    return left


def _tried(step: Step, device: torch.device) -> dict:
    begun = time.monotonic()
    try:
        found = {"lines": step.lines(device)}
    except (Exception, SystemExit) as error:
        found = {"failed": "".join(traceback.format_exception(error))}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"step": step.name, "seconds": time.monotonic() - begun, **found}


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def collect(folder: Path) -> int:
    """Add the lines of all parts in `folder` to bench/results.jsonl, each once, and write bench/RESULTS.md; returns how many are new."""
    path = run.HERE / "results.jsonl"
    known = path.read_text(encoding="utf-8").splitlines()
    found = [
        json.dumps(line, sort_keys=True)
        for part in sorted(folder.glob("part-*.jsonl"))
        for r in _records(part)
        for line in r.get("lines", ())
    ]
    new = [line for line in found if line not in set(known)]
    write_whole(path, "".join(f"{line}\n" for line in known + new).encode())
    run.write_results([json.loads(line) for line in known + new])
    return len(new)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 where every step is done."""
    options = tyro.cli(Options, args=arguments, prog="python -m bench.gpu")
    if options.part == 0:
        print(f"{collect(options.out)} new lines in bench/results.jsonl; bench/RESULTS.md is written")
        return 0
    if options.part not in PARTS:
        raise SystemExit(f"--part {options.part}: must be 1 to {len(PARTS)}, or 0.")
    if not torch.cuda.is_available():
        raise SystemExit("--part needs a GPU, and torch finds none here.")
    title, steps = PARTS[options.part]
    options.out.mkdir(parents=True, exist_ok=True)
    left = go_on(steps, options.out / f"part-{options.part}.jsonl", torch.device("cuda"))
    print(f"part {options.part}, {title}: {len(steps) - left} of {len(steps)} steps done")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
