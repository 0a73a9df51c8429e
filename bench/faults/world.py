"""Writes what the commands read: a tiny model with heads, a classifier, a scorer's module, and files of data.

Everything stands in one folder and is named by relative paths, so that a copy of the folder is as good.
"""

import json
import random
import shutil
from pathlib import Path

WORDS = (
    "river bread window garden copper silver letter music winter summer engine kitchen forest island "
    "market bridge candle mirror pencil ladder"
).split()
JUDGE = '''"""Scorers of texts."""


def letters(prompts, responses):
    return [float(len(set(r))) for r in responses]


def codes(prompts, responses):
    return [float(sum(map(ord, r)) % 25) for r in responses]
'''
# A template that writes the date: what it renders tomorrow is another prompt.
DATED = (
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}"
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_inputs(folder: Path) -> None:
    """Writes all inputs; equal ones each time."""
    from engine.stages.smoke import write_smoke_model

    rng = random.Random(0)
    write_smoke_model(folder / "model")
    write_smoke_model(folder / "dated")
    change_json(folder / "dated" / "tokenizer_config.json", "chat_template", DATED)
    (folder / "dated" / "chat_template.jinja").unlink(missing_ok=True)
    write_classifier(folder / "classifier", folder / "model")
    shutil.copytree(folder / "model" / "heads", folder / "heads")
    (folder / "judge.py").write_text(JUDGE)
    prompts = [f"Tell me about the {word}" for word in WORDS]
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts[:10]])
    write_lines(folder / "heldout.jsonl", [{"prompt": prompt} for prompt in prompts[10:16]])
    write_lines(folder / "fresh.jsonl", [{"prompt": prompt} for prompt in prompts[16:]])
    pairs = [
        {"prompt": prompt, "response_0": f"{word} is old", "response_1": f"a {word} sings"}
        for prompt, word in zip(prompts[:10], WORDS, strict=False)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    labels = [{**pair, "reward": rng.randrange(2), "harm": rng.randrange(2)} for pair in pairs]
    write_lines(folder / "preferences.jsonl", labels)
    rows = [
        {"prompt": prompt, "chosen": f"the {word} shines", "rejected": f"no {word} {i}"}
        for i, (prompt, word) in enumerate(zip(prompts, WORDS, strict=True))
    ]
    write_lines(folder / "head.jsonl", rows)
    scores = [
        {"prompt": prompt, "response": f"{word} {g}", "reward": rng.gauss(0, 1), "harm": rng.gauss(0, 1)}
        for prompt, word in zip(prompts, WORDS, strict=True)
        for g in range(4)
    ]
    write_lines(folder / "scores.jsonl", scores)


def write_classifier(folder: Path, model: Path) -> None:
    """Writes a tiny sequence-classification model with the tokenizer of `model`."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=2,
        pad_token_id=0,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    network = LlamaForSequenceClassification(config)
    network.config.architectures = ["LlamaForSequenceClassification"]
    network.config.save_pretrained(folder)
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.is_file() and not file.name.startswith(("config.", "model.", "generation_config")):
            shutil.copyfile(file, folder / file.name)


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """Reads a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change_json(path: Path, key: str, value: object) -> None:
    """Sets one key of a JSON file."""
    contents = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(contents | {key: value}), encoding="utf-8")
