"""Tiny scorers with random weights in the formats in which real ones are published, and their oracles."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PIECES = (
    "▁BEGINNING", "▁OF", "▁CONVERSATION", "▁USER", "▁ASSISTANT", "▁hello", "Hello", "▁yes", "▁no", "▁request",
)  # fmt: skip
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    head_dim=8,
)
GEMMA = dict(query_pre_attn_scalar=7, sliding_window=64, attn_logit_softcapping=5.0)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "Gemma2": {**GEMMA, "final_logit_softcapping": 0.5},
    "Gemma3Text": {**GEMMA, "attn_logit_softcapping": None},
}
TALKS = [
    [{"role": "user", "content": "How do I write a letter?"}],
    [
        {"role": "user", "content": "I am Bo."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is it?"},
    ],
]
ANSWERS = ["A cat.", "", "Hello! It is what it is, and more of that for a while, until the end.", " no"]


def everything() -> tuple[list[list[dict]], list[str]]:
    """Returns each answer to each of the talks, as scorers are given them."""
    return [talk for talk in TALKS for _ in ANSWERS], ANSWERS * len(TALKS)


def write_llama1_tokenizer(folder: Path) -> None:
    """Writes a tokenizer like that of the first Llama models: BPE with bytes to fall back on."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary += [chr(code) for code in range(33, 127)]
    merges = []
    for piece in PIECES:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                merges.append((piece[: end - 1], piece[end - 1]))
                vocabulary.append(piece[:end])
    vocabulary.append("<pad>")
    raw = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "model_max_length": 2048,
        "padding_side": "right",
        **{f"{name}_token": token for name, token in zip(("unk", "bos", "eos", "pad"), special, strict=True)},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = {key: token for key, token in config.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def write_llama1(folder: Path) -> Path:
    """Writes a model as conversions of LLaMA-1 are published, without a chat template."""
    write_llama1_tokenizer(folder)
    size = vocabulary_size(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=size - 1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    edit_config(folder, max_sequence_length=2048)
    return folder


def vocabulary_size(folder: Path) -> int:
    return len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])


def write_byte_tokenizer(
    folder: Path, template: str | None, *, pieces: str = "SUCYNyn", pad: str | None
) -> None:
    """Writes a tokenizer of bytes, and of a space with each of some letters."""
    tokens = ["<pad>", "</s>", "<s>", "<|turn|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Ġ", letter) for letter in pieces]
    tokens += [first + second for first, second in merges]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:5]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", bos_token="<s>", pad_token=pad
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_network(
    folder: Path, family: str, kind: str, seed: int = 0, **config
) -> transformers.PreTrainedModel:
    """Saves a model of transformers, such as Llama's ForCausalLM, whose weights all show in its results."""
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{"vocab_size": 270, **SIZES, **FAMILIES.get(family, {}), **config})
    network = getattr(transformers, f"{family}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * noise if weight.dim() == 2 else weight + 0.2 * noise)
    network.save_pretrained(folder)
    return network


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of a config.json; None removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if not (key in changes and value is None)}
    (folder / "config.json").write_text(json.dumps(kept))


def write_shards(folder: Path, tensors: dict[str, Tensor], n: int) -> None:
    """Writes tensors as n safetensors files with an index."""
    names, placed = list(tensors), {}
    for i in range(n):
        file, part = f"model-{i + 1:05}-of-{n:05}.safetensors", names[i::n]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_beaver(
    folder: Path, *, later: bool = False, bias: float | None = None, **config
) -> Callable[[list[int]], float]:
    """Writes a Beaver model of 2023 or a later one; returns the score of a text's ids by transformers."""
    write_llama1_tokenizer(folder)
    size = vocabulary_size(folder)
    sizes = {"vocab_size": size, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    oracle = write_network(folder, "Llama", "Model", **sizes)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.bfloat16())
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(1, 32, generator=generator).bfloat16()
    mean, var = torch.tensor([0.75]).bfloat16(), torch.tensor([4.0]).bfloat16()
    tensors = {f"model.{name}": value.bfloat16() for name, value in oracle.state_dict().items()}
    tensors |= {"score_head.weight": weight, "normalizer.mean": mean, "normalizer.var": var}
    tensors["normalizer.count"] = torch.tensor([9])
    if not later:  # files of 2023 also hold the wavelengths of the rotary positions
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if bias is not None:
        tensors["score_head.bias"] = torch.tensor([bias]).bfloat16()
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, 3)
    both = {"do_normalize": False, "normalizer_type": None, "score_dim": 1, "score_type": "reward"}
    of_2023 = {"architectures": ["LlamaModelForScore"], "bias": False}
    of_later = {"architectures": ["LlamaForScore"], "score_bias": True, "momentum": None}
    numbers = {
        "pad_token_id": size - 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 2048,
    }
    edit_config(folder, **both, **numbers, **(of_later if later else of_2023), tie_word_embeddings=False)
    edit_config(folder, **config)
    settings = {**both, **config}
    oracle = oracle.double()  # so that the whole difference is the rounding of what is tested

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            state = oracle(torch.tensor([ids])).last_hidden_state[0, -1]
        raw = float(weight.double()[0] @ state) + (bias or 0.0)
        if not settings["do_normalize"]:
            return raw
        shift = float(mean) if settings["score_type"] == "reward" else 0.0
        return (raw - shift) / (float(var) ** 0.5 + 1e-8)

    return score
