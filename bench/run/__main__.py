"""`python -m bench.run` lists the cases; `python -m bench.run CASE` checks, then measures, prints a table and adds a line to results.jsonl,
from which bench/RESULTS.md is written."""

import contextlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.run import floors, growth, iteration, llamacpp, loss_head, rollout, shapes, train_step
from bench.run.measure import interleaved, origin, peak_bytes
from engine import dual
from engine.checkpoint import write_whole
from engine.memory import keep_freed_memory
from engine.model import load
from engine.report import png
from engine.score import LogprobGap
from engine.stages import model_folder
from kernels import dual_moments

HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class LossHead:
    """Preference loss, forward and backward, against the bare matrix products and its rivals."""

    shape: str = "smollm2-135m"
    """Head: smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, llama-3.1-8b or qwen3-8b."""
    rows: int = 1024
    """Completion tokens in the batch, a multiple of 128."""
    frozen: bool = False
    """No gradient in the head."""
    budgets_mb: tuple[int, ...] = ()
    """Further memory budgets, in MB, that ours is timed at."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    device: str = "cpu"
    """cpu or cuda."""
    keep_pages: bool = False
    """Freed memory stays with the process, for all candidates, as engine.train arranges it on a CPU; else as the allocator comes."""
    repeats: int = 15
    """Rounds; every candidate runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl and write bench/RESULTS.md anew."""


def run_loss_head(config: LossHead) -> dict:
    """Measure one shape; returns the line of results.jsonl."""
    device = torch.device(config.device)
    if config.keep_pages:
        keep_freed_memory()
    x = loss_head.make(config.shape, config.rows, config.frozen, getattr(torch, config.dtype), device)
    returned = sum(leaf.nbytes for leaf in x.leaves)
    eager_extra = peak_bytes(loss_head.eager(x), device) - returned
    steps = loss_head.candidates(x, eager_extra // 6)
    steps |= {f"dualign, {mb} MB": loss_head.ours(x, 10**6 * mb) for mb in config.budgets_mb}
    _, not_run = _add_rivals(steps, loss_head.rivals(x))
    errors = loss_head.check(steps, x)
    products = loss_head.floor(x)
    measured = _measure(steps, products, config.repeats, device) | {"not_run": not_run}
    for row in measured["candidates"]:
        row["errors"] = errors[row["name"]]
        row["extra_bytes"] -= returned
    width, vocabulary = loss_head.SHAPES[config.shape]
    return {
        "case": "loss_head", "shape": config.shape, "rows": config.rows, "width": width, "vocabulary": vocabulary, "dtype": config.dtype,
        "frozen": config.frozen, "keep_pages": config.keep_pages, "flops": len(products) * 2 * config.rows * width * vocabulary,
        **measured, **origin(device),
    }  # fmt: skip


@dataclass(frozen=True)
class Rollout:
    """Sampling, against its floors, transformers' generate and continuous batching, and vLLM and llama.cpp where they are installed."""

    model: str = ""
    """Hugging Face folder; the quickstart's model where it is left out."""
    shape: str = ""
    """Instead of a model random weights in the sizes of a published one: smollm2-135m, qwen2.5-0.5b, qwen3-0.6b, llama-3.2-1b,
    qwen2.5-1.5b or llama-3.1-8b."""
    rows: int = 64
    """Responses sampled side by side, a multiple of 8: groups of 8 share a prompt."""
    real: bool = False
    """The quickstart's prompts, and responses that end where the model ends them; else random prompts, and no stop token."""
    prompt: int = 64
    """Tokens of each random prompt."""
    new: int = 64
    """New tokens of each response; with --real the most."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    device: str = "cpu"
    """cpu or cuda."""
    rivals: bool = True
    """Other engines too, not the floors alone."""
    keep_pages: bool = True
    """Freed memory stays with the process, for all candidates, as engine.train arranges it on a CPU; else as the allocator comes."""
    repeats: int = 5
    """Rounds; every candidate runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl and write bench/RESULTS.md anew."""


def run_rollout(config: Rollout) -> dict:
    """Measure; returns the line of results.jsonl."""
    device, dtype, n = torch.device(config.device), getattr(torch, config.dtype), 8
    if config.keep_pages:
        keep_freed_memory()
    if config.real and config.shape:
        raise SystemExit("--real: random weights never end a response; give a --model instead of a --shape.")
    with contextlib.ExitStack() as stack:
        name, folder, model = stack.enter_context(shapes.opened(config.model, config.shape, dtype, device))
        if config.real:
            work = rollout.real_work(folder, config.rows, n, config.new)
        else:
            work = rollout.random_work(model.config.vocab_size, config.rows, n, config.prompt, config.new)
        gap = rollout.gap(model, work)
        if dtype == torch.float32 and not gap.max <= 1e-4:
            raise SystemExit(f"{gap}: more than 1e-4; nothing is timed")
        steps = {"dualign": rollout.ours(model, work)}
        rivals: dict[str, Callable[[], Callable]] = {}
        if config.rivals:
            stock = rollout.stock(folder, dtype, device)
            rivals["transformers generate"] = lambda: rollout.transformers_generate(stock, work)
            rivals["transformers continuous batching"] = lambda: rollout.continuous_batching(stock, work)
            if rollout.vllm_serves(device):
                rivals["vLLM"] = lambda: rollout.vllm(folder, dtype, work)
            on_cpu = device.type == "cpu" and dtype == torch.float32
            if find_spec("llama_cpp") and on_cpu and llamacpp.serves(model.config, model.raw_config):
                rivals["llama.cpp"] = lambda: stack.enter_context(llamacpp.rival(folder, model, work, rollout.TEMPERATURE))
        # Seeds are fixed: every call of one candidate makes the same responses.
        made = {"dualign": steps["dualign"]()}
        answers, not_run = _add_rivals(steps, rivals)
        made |= answers
        for candidate, responses in made.items():
            work.check(candidate, responses)
        products, often = rollout.floor(model, work, made["dualign"])
        lengths = [len(response) for response in made["dualign"]]
        parts = floors.sampling(model.config, dtype.itemsize, [len(prompt) for prompt in work.prompts], n, lengths)
        measured = _measure(steps, products, config.repeats, device, often, parts, dtype) | {"not_run": not_run}
    for row in measured["candidates"]:
        row["tokens"] = sum(map(len, made[row["name"]]))
        for share in ("floor_share", "computed_share"):
            row[share] *= row["tokens"] / sum(lengths)
        if not config.real:
            row["step_s"] = row["median_s"] / config.new
        if row["name"] in ("llama.cpp", "vLLM"):
            row["extra_bytes"] = None  # torch sees none of it
    return {
        "case": "rollout", "shape": name, "rows": config.rows, "real": config.real, "prompt": None if config.real else config.prompt,
        "new": config.new, "dtype": config.dtype, "keep_pages": config.keep_pages, "logprob_gap": asdict(gap), "tokens": sum(lengths),
        "parting": rollout.parting(model, work) if dtype == torch.bfloat16 else None, **measured, **origin(device),
    }  # fmt: skip


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step of DPO with LoRA on every linear, or on all weights, against its floors and TRL's DPOTrainer."""

    model: str = ""
    """Hugging Face folder; the quickstart's model where it is left out."""
    shape: str = ""
    """Instead of a model random weights in the sizes of a published one, as in `rollout`."""
    tune: str = "lora"
    """lora or full."""
    pairs: int = 8
    """Pairs of responses in the batch."""
    prompt: int = 64
    """Tokens of each prompt."""
    response: int = 64
    """Tokens of each response."""
    dtype: str = "float32"
    """float32 or bfloat16; trained weights are float32 in any case."""
    device: str = "cpu"
    """cpu or cuda."""
    rivals: bool = True
    """TRL too, not the floors alone."""
    keep_pages: bool = True
    """Freed memory stays with the process, for all candidates, as engine.train arranges it on a CPU; else as the allocator comes."""
    repeats: int = 7
    """Rounds; every candidate runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl and write bench/RESULTS.md anew."""


def run_train_step(config: TrainStep) -> dict:
    """Measure; returns the line of results.jsonl."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.tune not in ("lora", "full"):
        raise SystemExit(f"--tune {config.tune}: must be lora or full.")
    full = config.tune == "full"
    if config.keep_pages:
        keep_freed_memory()
    with shapes.opened(config.model, config.shape, dtype, device) as (name, folder, model):
        groups = train_step.batch(model.config.vocab_size, config.pairs, config.prompt, config.response)
        reference = train_step.reference_logprob(model, groups)
        steps, rivals = {"dualign": train_step.ours(model, groups, reference, full=full)}, {}
        if config.rivals and find_spec("trl"):
            options = {"full": full, "dtype": dtype, "device": device}
            rivals["TRL DPOTrainer"] = lambda: train_step.trl(folder, groups, None, **options)
            rivals["TRL DPOTrainer, reference precomputed"] = lambda: train_step.trl(folder, groups, reference, **options)
        losses = {"dualign": steps["dualign"]()}
        answers, not_run = _add_rivals(steps, rivals)
        for candidate, loss in (losses | answers).items():
            # The policy is the reference at first; with 16 bits up to the rounding of log-probs summed over a response.
            if not abs(loss - math.log(2)) < (1e-4 if dtype == torch.float32 else 5e-2):
                raise SystemExit(f"{candidate}: the loss of the first step is {loss}, not ln 2; nothing is timed")
        parts = floors.training(model.config, dtype.itemsize, *train_step.sizes(groups), full=full)
        products = train_step.floor(model, groups, full=full)
        measured = _measure(steps, products, config.repeats, device, parts=parts, dtype=dtype) | {"not_run": not_run}
    tokens = 2 * config.pairs * (config.prompt + config.response)
    for row in measured["candidates"]:
        row["tokens_per_s"] = tokens / row["median_s"]
        row["rate_share"] = measured["flops"] / row["median_s"] / measured["flops_per_s"]
    return {
        "case": "train_step", "shape": name, "rows": 2 * config.pairs, "prompt": config.prompt, "new": config.response, "full": full,
        "dtype": config.dtype, "keep_pages": config.keep_pages, "tokens": tokens, **measured, **origin(device),
    }  # fmt: skip


@dataclass(frozen=True)
class Dual:
    """`engine.dual.solve` by Newton's method and by projected gradient, against one evaluation of value, gradient and Hessian."""

    prompts: int = 1000
    """P."""
    responses: int = 128
    """G."""
    constraints: int = 3
    """J."""
    repeats: int = 15
    """Rounds; every candidate runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl and write bench/RESULTS.md anew."""


def run_dual(config: Dual) -> dict:
    """Measure on the CPU in float64; returns the line of results.jsonl."""
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    P, G, J = config.prompts, config.responses, config.constraints
    reward = torch.randn(P, G, generator=generator, dtype=torch.float64)
    utility = torch.randn(P, G, J, generator=generator, dtype=torch.float64) - 0.5 * reward[..., None]
    problem = reward, utility, torch.linspace(0.2, 0.4, J), 1.0
    found = {method: dual.solve(*problem, method=method) for method in ("newton", "pgd")}
    if not max(x.kkt for x in found.values()) <= 1e-10:
        raise SystemExit(f"KKT residuals {[x.kkt for x in found.values()]}: more than 1e-10; nothing is timed")
    one = {"dual_moments": lambda: dual_moments(reward, utility, found["newton"].lam, 1.0)}
    steps = {method: lambda method=method: dual.solve(*problem, method=method) for method in found}
    measured = _measure(steps, {"moments": one}, config.repeats, device)
    for row in measured["candidates"]:
        row |= {"iterations": found[row["name"]].iterations, "kkt": found[row["name"]].kkt}
    return {
        "case": "dual",
        "shape": f"{P} x {G} x {J}",
        "keep_pages": False,
        **measured,
        **origin(device),
    }


@dataclass(frozen=True)
class Growth:
    """How the time of sampling and of a training step grows with rows, tokens and layers; draws bench/growth.png."""

    model: str = ""
    """Hugging Face folder; the quickstart's model where it is left out."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    device: str = "cpu"
    """cpu or cuda."""
    repeats: int = 3
    """Rounds; every size runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl, and write bench/RESULTS.md and the picture anew."""


def run_growth(config: Growth) -> dict:
    """Measure; returns the line of results.jsonl."""
    device = torch.device(config.device)
    keep_freed_memory()
    folder = model_folder(config.model)
    steps = growth.steps(load(folder, dtype=getattr(torch, config.dtype), device=device))
    times = interleaved({size.name: step for size, step in steps.items()}, config.repeats, device)
    points = [asdict(size) | {f"{k}_s": v for k, v in times[size.name].items()} for size in steps]
    return {
        "case": "growth", "shape": folder.name, "dtype": config.dtype, "keep_pages": True, "repeats": config.repeats, "points": points,
        **origin(device),
    }  # fmt: skip


@dataclass(frozen=True)
class Iteration:
    """Iterations of CAID on fresh samples, stage by stage, against their floors and TRL's OnlineDPOTrainer."""

    model: str = ""
    """Hugging Face folder; the quickstart's model where it is left out. A copy of it is given random score heads."""
    shape: str = ""
    """Instead of a model random weights in the sizes of a published one, as in `rollout`."""
    steps: int = 5
    """Policy steps of an iteration."""
    prompts: int = 16
    """Prompts in a policy step, two responses to each."""
    new: int = 48
    """Most tokens of a response; random weights hardly ever end one."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    device: str = "cpu"
    """cpu or cuda."""
    rivals: bool = True
    """TRL too, not the floors alone."""
    repeats: int = 3
    """Iterations that are counted."""
    save: bool = True
    """Add the figures to bench/results.jsonl and write bench/RESULTS.md anew."""


def run_iteration(config: Iteration) -> dict:
    """Measure; returns the line of results.jsonl."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    keep_freed_memory()
    size = iteration.Size(config.steps, config.prompts, config.new)
    with shapes.opened(config.model, config.shape, dtype, device) as (name, folder, model), tempfile.TemporaryDirectory() as scratch:
        c = model.config
        del model
        own = shutil.copytree(folder, Path(scratch) / "model")
        found = iteration.run(own, size, config.repeats, dtype, device)
        probes = floors.probes(dtype, device)
        given, prompt = iteration.prompts(folder, size.steps * size.prompts)
        rival: dict[str, Callable] = {}
        makers = {"TRL OnlineDPOTrainer": lambda: iteration.trl(folder, size, given, dtype, device)}
        _, not_run = _add_rivals(rival, makers if config.rivals and find_spec("trl") else {})
        times = interleaved(rival, config.repeats, device) | interleaved({k: probe.step for k, probe in probes.items()}, 5, device)
    tokens = sum(x["tokens"] for x in found) / len(found)
    rates = floors.rates(probes, times)
    least = iteration.least(c, dtype.itemsize, size, prompt, tokens / (iteration.N * size.steps * size.prompts), rates)
    rows = iteration.stages_of(found, least)
    rows += [{"name": k, **{f"{q}_s": v for q, v in times[k].items()}, "computed_share": None, "time_share": None} for k in rival]
    return {
        "case": "iteration", "shape": name, "rows": iteration.N * size.prompts, "steps": size.steps, "prompt": prompt, "new": size.new,
        "dtype": config.dtype, "keep_pages": True, "tokens": tokens, "least_s": least, **asdict(rates), "repeats": config.repeats,
        "candidates": rows, "not_run": not_run, **origin(device),
    }  # fmt: skip


def _add_rivals(steps: dict[str, Callable], makers: dict[str, Callable[[], Callable]]) -> tuple[dict[str, object], dict[str, str]]:
    """Add to `steps` each rival that can be made and called; returns (name -> what its first call gave, name of another -> its error)."""
    answers, not_run = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            answers[name] = step()
        except Exception as error:
            not_run[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        steps[name] = step
    if not_run and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers, not_run


def _measure(
    steps: dict[str, Callable], products: dict[str, dict[str, Callable]], repeats: int, device: torch.device,
    times_of: dict[str, float] | None = None, parts: list[floors.Part] | None = None, dtype: torch.dtype = torch.float32,
) -> dict:  # fmt: skip
    """What a line of results says of times: a row per candidate, seconds of the floor, who was fastest at each product. Products count
    `times_of` times, or once. With `parts` also the floor computed from their bytes and flops, and the rates that it rests on."""
    bare = {f"{product} / {way}": step for product, ways in products.items() for way, step in ways.items()}
    probes = floors.probes(dtype, device) if parts else {}
    times = interleaved(steps | bare | {name: probe.step for name, probe in probes.items()}, repeats, device)
    fastest = {p: min(ways, key=lambda way, p=p: times[f"{p} / {way}"]["median"]) for p, ways in products.items()}
    floor_s = sum((times_of or {}).get(p, 1) * times[f"{p} / {way}"]["median"] for p, way in fastest.items())
    rows = [
        {
            "name": name,
            **{f"{k}_s": v for k, v in times[name].items()},
            "floor_share": floor_s / times[name]["median"],
            "extra_bytes": peak_bytes(step, device),
        }
        for name, step in steps.items()
    ]
    measured = {"repeats": repeats, "floor_s": floor_s, "floor_layouts": fastest, "candidates": rows}
    if parts:
        rates = floors.rates(probes, times)
        computed = floors.seconds(parts, rates)
        measured |= {"bytes": sum(p.bytes for p in parts), "flops": sum(p.flops for p in parts), **asdict(rates)}
        measured |= {"computed_s": sum(computed.values()), "computed_parts_s": computed}
        for row in rows:
            row["computed_share"] = measured["computed_s"] / row["median_s"]
    return measured


def table_of(line: dict) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, rows) of one line of results."""
    if line["case"] == "table":
        return line["shape"], line["header"], [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in line["table"]]
    pages = ", freed memory kept" if line["keep_pages"] else ""
    if line["case"] == "growth":
        rows = [
            [what, axis, ", ".join(str(x) for x, _ in curve), ", ".join(f"{1000 * s:.0f}" for _, s in curve), f"{growth.slope(curve):.2f}"]
            for (what, axis), curve in growth.curves(line["points"]).items()
        ]
        title = f"growth: {line['shape']}, prompts of {growth.PROMPT}, {line['dtype']}{pages}; one size at a time"
        return title, ["", "size", "tried", "ms, medians", "power of the size at the end (1: linear)"], rows
    if line["case"] == "iteration":
        return _table_of_iteration(line)
    if line["case"] == "loss_head":
        title = (
            f"loss_head: {line['shape']}, {line['rows']} rows x {line['width']} x {line['vocabulary']}, {line['dtype']}, "
            f"{'frozen head' if line['frozen'] else 'full fine-tuning'}{pages}; floor ({len(line['floor_layouts'])} bare products) "
            f"{1000 * line['floor_s']:.1f} ms, {line['flops'] / line['floor_s'] / 1e9:.0f} Gflop/s"
        )
    elif line["case"] == "dual":
        title = f"dual: solve on {line['shape']} (prompts x responses x constraints), float64; floor (one evaluation of the dual) "
        title += f"{1000 * line['floor_s']:.1f} ms"
    else:
        what = f"{line['rows']} responses of {line['new']} tokens to prompts of {line['prompt']}"
        if line.get("real"):
            what = f"{line['rows']} responses of at most {line['new']} tokens to {line['rows'] // 8} prompts of the quickstart"
        tuned = ", full fine-tuning" if line.get("full") else ""
        title = f"{line['case']}: {line['shape']}, {what}, {line['dtype']}{tuned}{pages}; floor (bare products) "
        title += f"{1000 * line['floor_s']:.0f} ms"
        if "computed_s" in line:
            title += f", floor by bytes and flops {1000 * line['computed_s']:.0f} ms"
    done = {c["name"]: c.get("tokens", line.get("tokens", 1)) for c in line["candidates"]}
    ours = next(c["median_s"] / done[c["name"]] for c in line["candidates"] if c["name"] in ("dualign", "newton"))
    columns: dict[str, Callable[[dict], str]] = {
        "": lambda c: c["name"],
        "ms, median": lambda c: f"{1000 * c['median_s']:.1f}",
        "p20 to p80": lambda c: f"{1000 * c['p20_s']:.1f} to {1000 * c['p80_s']:.1f}",
    }
    if line["case"] == "rollout" and not line.get("real"):
        columns["ms per step"] = lambda c: f"{1000 * c['median_s'] / line['new']:.2f}"
    columns["of the floor"] = lambda c: f"{100 * c['floor_share']:.1f} %"
    if "computed_s" in line:
        columns["of that by bytes and flops"] = lambda c: f"{100 * c['computed_share']:.1f} %"
    if line["case"] == "train_step" and "flops_per_s" in line:
        columns["of the rate of products"] = lambda c: f"{100 * c['rate_share']:.1f} %"
    ratio = "time of a token / ours" if line["case"] == "rollout" else "time / ours"
    columns[ratio] = lambda c: f"{c['median_s'] / done[c['name']] / ours:.2f}"
    columns["extra memory, MB"] = lambda c: "not seen" if c["extra_bytes"] is None else f"{c['extra_bytes'] / 1e6:.0f}"
    if line["case"] == "loss_head":
        columns["largest relative error"] = lambda c: f"{max(c['errors'].values()):.0e}"
    elif line["case"] == "dual":
        columns["KKT residual"] = lambda c: f"{c['iterations']} iterations, {c['kkt']:.0e}"
    else:
        columns["tokens/s"] = lambda c: f"{done[c['name']] / c['median_s']:.0f}"
    return title, list(columns), [[show(c) for show in columns.values()] for c in line["candidates"]]


def _table_of_iteration(line: dict) -> tuple[str, list[str], list[list[str]]]:
    title = (
        f"iteration: {line['shape']}, CAID, {line['steps']} policy steps of {line['rows']} responses of at most {line['new']} tokens, "
        f"{line['dtype']}, freed memory kept"
    )
    # What TRL does in its steps.
    own = sum(c["median_s"] for c in line["candidates"] if c["name"] in ("rollout", "scoring", "policy steps"))
    rows = []
    for c in line["candidates"]:
        shares = [f"{100 * c[key]:.1f} %" if c[key] is not None else "" for key in ("time_share", "computed_share")]
        ratio = f"{c['median_s'] / own:.2f}" if c["time_share"] is None else ""
        rows.append([c["name"], f"{1000 * c['median_s']:.0f}", f"{1000 * c['p20_s']:.0f} to {1000 * c['p80_s']:.0f}", *shares, ratio])
    header = ["", "ms, median", "p20 to p80", "of the iteration", "of the floor by bytes and flops"]
    return title, [*header, "time / our rollout, scoring and policy steps"], rows


def notes_of(line: dict) -> list[str]:
    """What is said under the table."""
    if line["case"] == "table":
        return line["notes"]
    notes = [f"{name} did not run: {why}" for name, why in line.get("not_run", {}).items()]
    if "computed_s" in line:
        parts = ", ".join(f"{name} {1000 * s:.3g}" for name, s in line["computed_parts_s"].items())
        rates = f"{line['bytes_per_s'] / 1e9:.0f} GB/s and {line['flops_per_s'] / 1e12:.3g} Tflop/s"
        notes.append(f"Floor by bytes and flops, ms: {parts}; at {rates}, measured in the same rounds.")
    if "logprob_gap" in line:
        notes.append(f"Here {LogprobGap(**line['logprob_gap'])}.")
    if line.get("parting"):
        share, tokens = line["parting"]
        after = f", after {tokens:.0f} equal tokens on average" if share else ""
        notes.append(f"{100 * share:.0f} % of the responses differ from those sampled one prompt at a time{after}.")
    return notes


def write_results(lines: list[dict]) -> None:
    """bench/RESULTS.md from all lines, the latest of each case and shape."""
    keys = ("case", "shape", "rows", "real", "prompt", "new", "dtype", "frozen", "full", "keep_pages", "device")
    latest = {tuple(x.get(k) or None for k in keys): x for x in lines}
    text = [
        "# Results", "",
        "Written by `python -m bench.run`; do not edit. Only figures of one table are comparable. Extra memory is the most that torch held",
        "at once in a call, beyond what was there before and what it returns; what other libraries allocate themselves is not in it.", "",
    ]  # fmt: skip
    for line in latest.values():
        title, header, rows = table_of(line)
        text += [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        text += ["| " + " | ".join(row) + " |" for row in rows]
        if line["case"] == "growth":
            text += ["", "![Time against size](growth.png)"]
        for note in notes_of(line):
            text += ["", note]
        versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
        driver = f", driver {line['driver']}" if line["driver"] else ""
        text += ["", f"{line['device']}, {line['threads']} threads{driver}, {versions}, commit {line['commit']}, {line['date']}.", ""]
    (HERE / "RESULTS.md").write_text("\n".join(text), encoding="utf-8")


CASES = {
    "loss_head": (LossHead, run_loss_head), "rollout": (Rollout, run_rollout), "train_step": (TrainStep, run_train_step),
    "iteration": (Iteration, run_iteration), "growth": (Growth, run_growth), "dual": (Dual, run_dual),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if not arguments or arguments[0] not in CASES:
        print("python -m bench.run CASE [--help]; cases:")
        for name, (config, _) in CASES.items():
            print(f"  {name:12} {config.__doc__}")
        return 2 if arguments and arguments[0] not in ("-h", "--help") else 0
    config_class, function = CASES[arguments[0]]
    config = tyro.cli(config_class, args=arguments[1:], prog=f"python -m bench.run {arguments[0]}")
    line = function(config)
    title, header, rows = table_of(line)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes_of(line):
        console.print(note)
    if config.save:
        path = HERE / "results.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
        write_results([json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()])
        if line["case"] == "growth":
            write_whole(HERE / "growth.png", png(lambda: growth.draw(line["points"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
