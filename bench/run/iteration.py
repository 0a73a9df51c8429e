"""Iterations of CAID on the policy's samples, stage by stage, against their floors and TRL's
OnlineDPOTrainer on as many tokens.

Ours is a run of `engine.caid` as a user starts it, with `pairs="policy"` and two responses to each prompt:
rollout, scoring, policy steps on an adapter of the upper half, and the slack on further prompts. The first
iteration learns from the reference's samples, so it is not counted, nor are the reference's and the held-out
stages. TRL samples, scores and learns in every step, on an adapter of the same layers; it measures no slack.
The two run one after the other, not in turns.
"""

import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.run import floors, shapes
from bench.run.candidates import add_rivals, in_seconds
from bench.run.measure import interleaved, summary
from bench.run.options import Device, Dtype, Save, Shape
from bench.run.origin import origin
from bench.run.tables import Table
from bench.run.train_step import LINEARS, RATE, stepper
from engine import caid
from engine.config import CaidConfig
from engine.data.prompts import load_prompts, shipped_prompts
from engine.model.architecture import ModelConfig
from engine.policy.lora import first_layer
from engine.run.machine import keep_freed_memory
from engine.run.rows import SpeedRow, StageTimeRow, read_timing
from engine.stages.smoke import write_random_heads

N = 2  # responses to a prompt
SLACK_SHARE = 4  # one prompt measures the slack for as many that are trained on
RANK = CaidConfig.lora_rank


@dataclass(frozen=True)
class Iteration:
    """Iterations of CAID on fresh samples, stage by stage, against their floors
    and TRL's OnlineDPOTrainer."""

    model: str = ""
    """Hugging Face folder, of which a copy gets random score heads; by default the quickstart's model."""
    shape: Shape = ""
    steps: int = 5
    """Policy steps of an iteration."""
    prompts: int = 16
    """Prompts in a policy step, two responses to each."""
    new: int = 48
    """Most tokens of a response; random weights hardly ever end one."""
    dtype: Dtype = "float32"
    device: Device = "cpu"
    rivals: bool = True
    """TRL too, not the floors alone."""
    repeats: int = 3
    """Iterations that are counted."""
    save: Save = True


def run(config: Iteration) -> dict:
    """Measures; returns the line of results.jsonl."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    keep_freed_memory()
    size = Size(config.steps, config.prompts, config.new)
    opened = shapes.opened(config.model, config.shape, dtype, device)
    with opened as (name, folder, model), tempfile.TemporaryDirectory() as scratch:
        architecture = model.config
        del model
        copied = shutil.copytree(folder, Path(scratch) / "model")
        iterations = timed_iterations(copied, size, config.repeats, dtype, device)
        probes = floors.probes(dtype, device)
        given, prompt = prompts(folder, size.steps * size.prompts)
        rival: dict[str, Callable] = {}
        makers = {"TRL OnlineDPOTrainer": lambda: trl(folder, size, given, dtype, device)}
        _, not_run = add_rivals(rival, makers if config.rivals and find_spec("trl") else {})
        times = interleaved(rival, config.repeats, device)
        times |= interleaved({k: probe.step for k, probe in probes.items()}, 5, device)
    tokens = sum(x.tokens for x in iterations) / len(iterations)
    response = tokens / (N * size.steps * size.prompts)
    rates = floors.rates(probes, times)
    least_s = least(architecture, dtype.itemsize, size, prompt, response, rates)
    rows = stage_rows(iterations, least_s)
    rows += [{"name": k, **in_seconds(times[k]), "computed_share": None, "time_share": None} for k in rival]
    return {
        "case": "iteration",
        "shape": name,
        "rows": N * size.prompts,
        "steps": size.steps,
        "prompt": prompt,
        "new": size.new,
        "dtype": config.dtype,
        "keep_pages": True,
        "tokens": tokens,
        "least_s": least_s,
        **asdict(rates),
        "repeats": config.repeats,
        "candidates": rows,
        "not_run": not_run,
        **origin(device),
    }


def table(line: dict) -> Table:
    """Returns the table of a line."""
    title = (
        f"iteration: {line['shape']}, CAID, {line['steps']} policy steps of {line['rows']} responses of at "
        f"most {line['new']} tokens, {line['dtype']}, freed memory kept"
    )
    # TRL does these in its steps.
    same = ("rollout", "scoring", "policy steps")
    ours = sum(c["median_s"] for c in line["candidates"] if c["name"] in same)
    rows = []
    for c in line["candidates"]:
        spread = f"{1000 * c['p20_s']:.0f} to {1000 * c['p80_s']:.0f}"
        shares = [c["time_share"], c["computed_share"]]
        shown = [f"{100 * share:.1f} %" if share is not None else "" for share in shares]
        ratio = f"{c['median_s'] / ours:.2f}" if c["time_share"] is None else ""
        rows.append([c["name"], f"{1000 * c['median_s']:.0f}", spread, *shown, ratio])
    header = [
        "",
        "ms, median",
        "p20 to p80",
        "of the iteration",
        "of the floor by bytes and flops",
        "time / our rollout, scoring and policy steps",
    ]
    return Table(title, header, rows)


@dataclass(frozen=True)
class Size:
    """The size of an iteration."""

    steps: int
    prompts: int  # in a step
    new: int  # most tokens of a response

    @property
    def slack_prompts(self) -> int:
        """Returns the number of prompts that measure the slack, with N responses each."""
        return max(2, self.steps * self.prompts // SLACK_SHARE)


class Timed(NamedTuple):
    """One iteration of a run."""

    tokens: int  # sampled for the policy steps
    seconds: dict[str, float]  # stage -> seconds


def timed_iterations(
    folder: Path, size: Size, iterations: int, dtype: torch.dtype, device: torch.device
) -> list[Timed]:
    """Runs CAID and times its iterations; the model in `folder` is given random score heads."""
    write_random_heads(folder)
    with tempfile.TemporaryDirectory() as scratch:
        config = CaidConfig(
            out=str(Path(scratch) / "run"),
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            pairs="policy",
            n_prompts=size.steps * size.prompts + size.slack_prompts,
            n_responses=N,
            max_new_tokens=size.new,
            steps=size.steps,
            prompts_per_step=size.prompts,
            slack_prompts=size.slack_prompts,
            slack_responses=N,
            iterations=1 + iterations,
            margin=0.0,
            force=True,
            eval_prompts=2,
            eval_responses=N,
            learning_rate=RATE,
            # Else an update would draw the answers that measure its slack, for the same time.
            max_kl_ratio=math.inf,
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            caid.train(config)
        speeds = {row.stage: row for row in read_timing(config.out, SpeedRow)}
        seconds = {row.stage: row.seconds for row in read_timing(config.out, StageTimeRow)}
    return [_timed(speeds, seconds, f"iteration-{t}") for t in range(2, 2 + iterations)]


def _timed(speeds: dict[str, SpeedRow], spent: dict[str, float], name: str) -> Timed:
    """Reads one iteration from the speeds and seconds of a run's stages."""
    policy, slack = (speeds[f"{name}/{stage}"] for stage in ("policy", "slack"))
    policy_s, slack_s = (spent[f"{name}/{stage}"] for stage in ("policy", "slack"))
    seconds = {
        "rollout": policy.sampling_s,
        "scoring": policy.scoring_s,
        "policy steps": policy_s - policy.sampling_s - policy.scoring_s,
        "slack: rollout": slack.sampling_s,
        "slack: scoring": slack.scoring_s,
        "slack: rest": slack_s - slack.sampling_s - slack.scoring_s,
    }
    return Timed(policy.tokens, seconds)


def least(
    c: ModelConfig, itemsize: int, size: Size, prompt: int, response: float, on: floors.Rates
) -> dict[str, float]:
    """Returns stage -> its least seconds, with all prompts and responses of the given lengths.

    Layers below the adapter are passed once, in sampling. "slack: rest" has no floor.
    """
    share = 1 - first_layer(c.num_layers, CaidConfig.lora_from) / c.num_layers
    parts = {}
    for name, prompts in (("", size.steps * size.prompts), ("slack: ", size.slack_prompts)):
        lengths = [max(1, round(response))] * (N * prompts)
        tokens = round(N * prompts * response)
        parts[f"{name}rollout"] = floors.sampling(c, itemsize, [prompt] * prompts, N, lengths)
        parts[f"{name}scoring"] = floors.passes(
            c, itemsize, prompts * prompt + tokens, tokens, 1, share=share
        )
    tokens, predicted = size.prompts * (prompt + N * response), size.prompts * N * response
    step = floors.passes(c, itemsize, tokens, predicted, 2, share=share)
    parts["policy steps"] = size.steps * step
    return {stage: sum(floors.seconds(some, on).values()) for stage, some in parts.items()}


def prompts(folder: Path, count: int) -> tuple[list[list[dict[str, str]] | str], int]:
    """Returns `count` prompts of the quickstart as TRL takes them, over again where there are too few, and
    their mean length in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = shipped_prompts("train")
    loaded = load_prompts(path, tokenizer, system=CaidConfig.system, max_prompt_tokens=4096)
    texts = [loaded.text[i % len(loaded)] for i in range(count)]
    if tokenizer.chat_template:
        system = {"role": "system", "content": CaidConfig.system}
        texts = [[system, {"role": "user", "content": text}] for text in texts]
    return texts, round(sum(map(len, loaded.token_ids)) / len(loaded))


def trl(
    folder: Path, size: Size, given: list, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Returns `size.steps` steps of TRL's OnlineDPOTrainer without vLLM: sampling, scoring by length, loss,
    backward, clipping, AdamW."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layers = model.config.num_hidden_layers
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(first_layer(layers, CaidConfig.lora_from), layers)),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as scratch:
        options = OnlineDPOConfig(
            output_dir=scratch,
            max_new_tokens=size.new,
            max_length=4096,
            temperature=CaidConfig.temperature,
            top_k=0,
            report_to=[],
            use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            per_device_train_batch_size=size.prompts,
            gradient_checkpointing=False,
        )
        trainer = OnlineDPOTrainer(
            model,
            reward_funcs=_length,
            args=options,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            peft_config=lora,
        )
    trainer.model.to(device)
    place = iter(range(1 << 30))

    def add_gradients() -> float:
        first = next(place) % size.steps * size.prompts
        return float(trainer.training_step(trainer.model, {"prompt": given[first : first + size.prompts]}))

    step = stepper([p for p in trainer.model.parameters() if p.requires_grad], add_gradients, False)

    def iteration() -> None:
        for _ in range(size.steps):
            step()

    return iteration


def _length(prompts: list[str], completions: list[str], **more) -> list[float]:
    """Scores a completion by its length, as TRL asks a reward function."""
    return [float(len(text)) for text in completions]


def stage_rows(iterations: list[Timed], least_s: dict[str, float]) -> list[dict]:
    """Returns a row per stage and one for the whole: median, p20, p80, share of the floor
    (None without one) and of the iteration."""
    whole = summary([sum(x.seconds.values()) for x in iterations])
    rows = []
    for stage in iterations[0].seconds:
        times = summary([x.seconds[stage] for x in iterations])
        floor_s = least_s.get(stage)
        share = None if floor_s is None else floor_s / times["median"]
        rows.append({"name": stage, **in_seconds(times), "computed_share": share})
    share = sum(least_s.values()) / whole["median"]
    rows.append({"name": "dualign, iteration", **in_seconds(whole), "computed_share": share})
    for row in rows:
        row["time_share"] = row["median_s"] / whole["median"]
    return rows
