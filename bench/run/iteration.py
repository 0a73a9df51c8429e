"""Iterations of CAID on the policy's own samples, stage by stage, against their floors and TRL's OnlineDPOTrainer on as many tokens.

Ours is a run of `engine.caid` as a user starts it, with `pairs="policy"` and two responses to each prompt: rollout, scoring, policy steps
on an adapter of the upper half, and the slack on prompts of its own. The first iteration, which learns from the reference's samples, and
the reference's and the held-out stages are not counted. TRL samples, scores and learns in every step, on an adapter of the same layers; it
measures no slack. The two run one after the other, not in turns.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.run import floors
from bench.run.measure import summary
from bench.run.train_step import LINEARS, RATE, stepper
from engine import caid
from engine.architecture import ModelConfig
from engine.config import CaidConfig
from engine.data import load_prompts, shipped_prompts
from engine.lora import first_layer
from engine.metrics import read_timing
from engine.smoke import write_random_heads

N = 2  # responses to a prompt
SLACK_SHARE = 4  # one prompt measures the slack for as many that are trained on
RANK = CaidConfig.lora_rank


@dataclass(frozen=True)
class Size:
    """Of an iteration."""

    steps: int
    prompts: int  # in a step
    new: int  # most tokens of a response

    @property
    def slack_prompts(self) -> int:
        """Each with N responses too."""
        return max(2, self.steps * self.prompts // SLACK_SHARE)


def run(folder: Path, size: Size, iterations: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Seconds and tokens of each of `iterations` iterations; the model in `folder` is given random score heads."""
    write_random_heads(folder)
    with tempfile.TemporaryDirectory() as scratch:
        config = CaidConfig(
            out=str(Path(scratch) / "run"), model=str(folder), dtype=str(dtype).removeprefix("torch."), device=str(device), pairs="policy",
            n_prompts=size.steps * size.prompts + size.slack_prompts, n_responses=N, max_new_tokens=size.new, steps=size.steps,
            prompts_per_step=size.prompts, slack_prompts=size.slack_prompts, slack_responses=N, iterations=1 + iterations, margin=0.0,
            force=True, eval_prompts=2, eval_responses=N, learning_rate=RATE,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            caid.train(config)
        rows = read_timing(config.out)
    stages = {(row["kind"], row["stage"]): row for row in rows}
    return [_of_iteration(stages, f"iteration-{t}") for t in range(2, 2 + iterations)]


def _of_iteration(stages: dict[tuple[str, str], dict], name: str) -> dict:
    policy, slack = (stages["timing", f"{name}/{stage}"] for stage in ("policy", "slack"))
    whole = {stage: stages["stage", f"{name}/{stage}"]["seconds"] for stage in ("policy", "slack")}
    return {
        "tokens": policy["tokens"], "slack_tokens": slack["tokens"],
        "seconds": {
            "rollout": policy["sampling_s"],
            "scoring": policy["scoring_s"],
            "policy steps": whole["policy"] - policy["sampling_s"] - policy["scoring_s"],
            "slack: rollout": slack["sampling_s"],
            "slack: scoring": slack["scoring_s"],
            "slack: rest": whole["slack"] - slack["sampling_s"] - slack["scoring_s"],
        },
    }  # fmt: skip


def least(c: ModelConfig, itemsize: int, size: Size, prompt: int, response: float, on: floors.Rates) -> dict[str, float]:
    """Stage -> least seconds, with prompts and responses of the given lengths throughout. Layers below the adapter are passed once, in
    sampling; "slack: rest" has none."""
    share = 1 - first_layer(c.num_layers, CaidConfig.lora_from) / c.num_layers
    found = {}
    for name, prompts in (("", size.steps * size.prompts), ("slack: ", size.slack_prompts)):
        made = round(N * prompts * response)
        sampled = floors.sampling(c, itemsize, [prompt] * prompts, N, [max(1, round(response))] * (N * prompts))
        passed = floors.passes(c, itemsize, prompts * prompt + made, made, 1, share=share)
        found |= {f"{name}rollout": sampled, f"{name}scoring": passed}
    tokens, made = size.prompts * (prompt + N * response), size.prompts * N * response
    found["policy steps"] = size.steps * floors.passes(c, itemsize, tokens, made, 2, share=share)
    return {stage: sum(floors.seconds(parts, on).values()) for stage, parts in found.items()}


def prompts(folder: Path, count: int) -> tuple[list[list[dict[str, str]] | str], int]:
    """`count` prompts of the quickstart, over again where there are too few, as TRL takes them, and their mean length in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = load_prompts(shipped_prompts("train"), tokenizer, system=CaidConfig.system, max_prompt_tokens=4096)
    texts = [found.text[i % len(found)] for i in range(count)]
    system = {"role": "system", "content": CaidConfig.system}
    given = [[system, {"role": "user", "content": text}] for text in texts] if tokenizer.chat_template else texts
    return given, round(sum(map(len, found.token_ids)) / len(found))


def trl(folder: Path, size: Size, given: list, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """`size.steps` steps of TRL's OnlineDPOTrainer without vLLM: sampling, scoring by length, loss, backward, clipping, AdamW."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layers = model.config.num_hidden_layers
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM",
        layers_to_transform=list(range(first_layer(layers, CaidConfig.lora_from), layers)),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as scratch:
        options = OnlineDPOConfig(
            output_dir=scratch, max_new_tokens=size.new, max_length=4096, temperature=CaidConfig.temperature, top_k=0, report_to=[],
            use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, disable_tqdm=True, dataloader_pin_memory=False,
            per_device_train_batch_size=size.prompts, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = OnlineDPOTrainer(
            model, reward_funcs=_length, args=options, processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": "a"}]),
            peft_config=lora,
        )  # fmt: skip
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
    return [float(len(text)) for text in completions]


def stages_of(found: list[dict], least_s: dict[str, float]) -> list[dict]:
    """A row per stage and one for the whole: median, p20, p80, share of the floor (None without one) and of the iteration."""
    whole = summary([sum(x["seconds"].values()) for x in found])
    rows = []
    for stage in found[0]["seconds"]:
        times = summary([x["seconds"][stage] for x in found])
        floor_s = least_s.get(stage)
        rows.append({"name": stage, **_seconds(times), "computed_share": floor_s and floor_s / times["median"]})
    rows.append({"name": "dualign, iteration", **_seconds(whole), "computed_share": sum(least_s.values()) / whole["median"]})
    for row in rows:
        row["time_share"] = row["median_s"] / whole["median"]
    return rows


def _seconds(times: dict[str, float]) -> dict[str, float]:
    return {f"{name}_s": value for name, value in times.items()}
