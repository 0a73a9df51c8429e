"""Malformed model folders, tokenizers and chat templates."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.faults.alterations import template
from bench.faults.inputs.malformed import Malformed, with_flags
from bench.faults.world import change_json

CONFIG = {
    "hidden_size": ("thirty", -1, 0, 1.5, None, [32], 10**12, 33),
    "num_hidden_layers": (0, -1, "4", 10**8, None, 5, 3),
    "num_attention_heads": (0, 3, None, "2", 10**9),
    "vocab_size": (0, 10, -5, None, 10**12, 383),
    "intermediate_size": (0, None, "x"),
    "model_type": ("gpt9", 5, None, []),
    "rms_norm_eps": ("small", None, -1, "NaN"),
    "rope_theta": (0, "x", -1),
    "max_position_embeddings": (0, 1, -1, "many"),
    "hidden_act": ("sine", 5),
    "eos_token_id": ("x", 10**9, -1, [[1]]),
    "tie_word_embeddings": ("yes", 5),
    "architectures": ("Llama", [], [5], {}),
    "quantization_config": ({"bits": 4},),
    "rope_scaling": ({"type": "odd"}, 5, {"rope_type": "yarn"}),
    "num_key_value_heads": (0, 3, "x"),
    "head_dim": (0, "x", 7),
    "dtype": (5,),
}
TEMPLATES = {
    "syntax": "{% for %}",
    "zero-division": "{{ 1 / 0 }}",
    "add": "{{ 'a' + 1 }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "raises": "{{ raise_exception('no') }}",
    "undefined": "{{ nothing.at.all }}",
    "filter": "{{ 'a' | nofilter }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    # Ten times as long is refused too, but Jinja takes most of a minute to find out.
    "long": "{{ 'a' * 10**8 }}",
    "number": 5,
    "list": ["a"],
    "object": {"a": 1},
    "system-refused": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    ),
    "index": "{{ messages[7]['content'] }}",
    "key": "{{ messages[0]['colour']['x'] }}",
    "surrogate": "{{ '\\ud800' }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "type": "{{ messages + 5 }}",
    "attribute": "{{ messages.nothing() }}",
}
# Heads belong to the weights of one model.
OWN_SCORERS = ("--reward", "judge:letters", "--cost", "odd=judge:codes", "--audit")
# An index beside one whole file is an old one.
FINE = (
    "link", "extra-file", "code-file",
    "index-empty", "index-missing-file", "index-number", "index-beside-outside",
)  # fmt: skip
Write = Callable[[Path], object]


def cases() -> Iterator[Malformed]:
    """Lists model folders, then templates and tokenizers."""
    for key, values in CONFIG.items():
        for value in values:
            yield _model(
                f"config/{key}/{json.dumps(value)[:20].replace('/', '|')}",
                lambda work, k=key, v=value: change_json(work / "model" / "config.json", k, v),
                # Without a type the architecture tells what the model is.
                (key, value) == ("model_type", None)
                # What does not touch the weights may be as the folder says.
                or key
                in (
                    "max_position_embeddings",
                    "rope_theta",
                    "rms_norm_eps",
                    "eos_token_id",
                    "architectures",
                    "dtype",
                    "tie_word_embeddings",
                    "hidden_act",
                    "head_dim",
                    "num_key_value_heads",
                    "rope_scaling",
                ),
            )
    for name, write in _folders().items():
        yield _model(f"model/{name}", write, name in FINE)
    for name, text in TEMPLATES.items():
        write = template("model", text) if isinstance(text, str) else _odd_template(text)
        # Where a template takes no system line, that begins the first user turn, and the run says so.
        yield _model(f"templates/{name}", write, name == "system-refused")
    for name, write in _tokenizers().items():
        yield _model(f"tokenizer/{name}", write, name in ("no-generation", "config-class", "eos-none"))


def _model(name: str, write: Write, accepts: bool = False) -> Malformed:
    return Malformed(
        name,
        with_flags("--model", "model", *OWN_SCORERS),
        write,
        ("model", "config.json", "chat", "token", "--"),
        accepts,
    )


def _odd_template(value: object) -> Write:
    def write(work: Path) -> None:
        (work / "model" / "chat_template.jinja").unlink(missing_ok=True)
        change_json(work / "model" / "tokenizer_config.json", "chat_template", value)

    return write


def _folders() -> dict[str, Write]:
    """Returns model folders whose files are missing, cut or odd."""

    def weights(change: Callable[[bytes], bytes]) -> Write:
        def write(work: Path) -> None:
            path = work / "model" / "model.safetensors"
            path.write_bytes(change(path.read_bytes()))

        return write

    def config(text: str) -> Write:
        return lambda work: (work / "model" / "config.json").write_text(text)

    def index(names: dict) -> Write:
        def write(work: Path) -> None:
            (work / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

        return write

    def index_alone(place: Callable[[Path], str]) -> Write:
        """Moves the weights out of the folder; the index says where they are."""

        def write(work: Path) -> None:
            names = list(_tensors(work / "model" / "model.safetensors"))
            (work / "model" / "model.safetensors").rename(work / "x.safetensors")
            index(dict.fromkeys(names, place(work)))(work)

        return write

    return {
        "no-config": lambda work: (work / "model" / "config.json").unlink(),
        "config-empty": config(""),
        "config-list": config("[]"),
        "config-cut": config('{"a": '),
        "config-deep": config('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "config-number": config('{"a": ' + "9" * 5000 + "}"),
        "config-empty-object": config("{}"),
        "config-folder": lambda work: _as_folder(work / "model" / "config.json"),
        "no-weights": lambda work: (work / "model" / "model.safetensors").unlink(),
        "weights-empty": weights(lambda data: b""),
        "weights-cut": weights(lambda data: data[: len(data) // 2]),
        "weights-header": weights(lambda data: b"\xff" * 8 + data[8:]),
        "weights-junk": weights(lambda data: data + b"junk"),
        "weights-folder": lambda work: _as_folder(work / "model" / "model.safetensors"),
        "weights-pickle": lambda work: (work / "model" / "model.safetensors").rename(
            work / "model" / "pytorch_model.bin"
        ),
        "weights-nan": lambda work: _fill(work, float("nan")),
        "weights-infinite": lambda work: _fill(work, float("inf")),
        "weights-integers": lambda work: _fill(work, None),
        "weights-missing": lambda work: _drop(work),
        "index-outside": index_alone(lambda work: "../x.safetensors"),
        "index-absolute": index_alone(lambda work: str(work / "x.safetensors")),
        "index-beside-outside": index({"model.norm.weight": "../x.safetensors"}),
        "index-number": index({"model.norm.weight": 5}),
        "index-empty": index({}),
        "index-missing-file": index({"model.norm.weight": "other.safetensors"}),
        "adapter-beside": lambda work: (work / "model" / "adapter_config.json").write_text(
            '{"peft_type": "LORA"}'
        ),
        "weights-link-loop": lambda work: _loop(work / "model" / "model.safetensors"),
        "empty-folder": lambda work: _emptied(work / "model"),
        "link": lambda work: _linked(work),
        "code-file": lambda work: (work / "model" / "modeling.py").write_text("raise SystemExit\n"),
        "auto-map": lambda work: change_json(
            work / "model" / "config.json", "auto_map", {"AutoModelForCausalLM": "modeling.X"}
        ),
        "extra-file": lambda work: (work / "model" / "notes.txt").write_text("hello\n"),
    }


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _emptied(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


def _linked(work: Path) -> None:
    (work / "model").rename(work / "elsewhere")
    (work / "model").symlink_to("elsewhere")


def _tensors(path: Path) -> dict:
    import safetensors.torch

    return safetensors.torch.load_file(path)


def _fill(work: Path, value: float | None) -> None:
    """Fills a matrix of weights with a value, or stores it as integers."""
    import safetensors.torch

    path = work / "model" / "model.safetensors"
    tensors = _tensors(path)
    name = sorted(name for name in tensors if "down_proj" in name)[0]
    tensors[name] = tensors[name].int() if value is None else tensors[name].fill_(value)
    path.write_bytes(safetensors.torch.save(tensors))


def _drop(work: Path) -> None:
    """Leaves a tensor out."""
    import safetensors.torch

    path = work / "model" / "model.safetensors"
    tensors = _tensors(path)
    del tensors[sorted(tensors)[0]]
    path.write_bytes(safetensors.torch.save(tensors))


def _tokenizers() -> dict[str, Write]:
    """Returns tokenizers whose files are missing, cut or odd."""

    def text(name: str, contents: str) -> Write:
        return lambda work: (work / "model" / name).write_text(contents)

    return {
        "missing": lambda work: (work / "model" / "tokenizer.json").unlink(),
        "empty": text("tokenizer.json", ""),
        "list": text("tokenizer.json", "[]"),
        "object": text("tokenizer.json", "{}"),
        "cut": lambda work: os.truncate(work / "model" / "tokenizer.json", 300),
        "config-empty": text("tokenizer_config.json", ""),
        "config-list": text("tokenizer_config.json", "[]"),
        "config-class": lambda work: change_json(
            work / "model" / "tokenizer_config.json", "tokenizer_class", "NoSuch"
        ),
        "eos-unknown": lambda work: change_json(
            work / "model" / "tokenizer_config.json", "eos_token", "<|nothing|>"
        ),
        "eos-number": lambda work: change_json(work / "model" / "tokenizer_config.json", "eos_token", 5),
        "eos-none": lambda work: change_json(work / "model" / "tokenizer_config.json", "eos_token", None),
        "auto-map": lambda work: change_json(
            work / "model" / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.Y", None]}
        ),
        "generation-text": text("generation_config.json", '{"eos_token_id": "x"}'),
        "generation-list": text("generation_config.json", "[]"),
        "generation-empty": text("generation_config.json", ""),
        "generation-far": text("generation_config.json", '{"eos_token_id": 99999}'),
        "generation-folder": lambda work: _folder_at(work / "model" / "generation_config.json"),
        "no-generation": lambda work: (work / "model" / "generation_config.json").unlink(missing_ok=True),
    }


def _folder_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
