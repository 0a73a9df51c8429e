"""A tiny model folder in the published format of LLaMA-1 conversions.

It has sentencepiece's ids in a tokenizer.json, and no chat template.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

PIECES = ["▁BEGINNING", "▁OF", "▁CONVERSATION", "▁USER", "▁ASSISTANT", "▁hello", "Hello"]
LETTERS = "▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-#()/"


def llama1_tokenizer() -> Tokenizer:
    """Builds tokenizer.json: ids 0 <unk>, 1 <s>, 2 </s>, 3 to 258 the bytes, then letters and pieces, and at
    the end <pad>."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    merges = []
    for piece in PIECES:
        for end in range(1, len(piece)):
            merge, merged = (piece[:end], piece[end]), piece[: end + 1]
            merges += [merge] if merge not in merges else []
            tokens += [merged] if merged not in tokens else []
    tokens.append("<pad>")
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>", "<pad>")]
    )
    return made


def write_llama1(folder: Path) -> Path:
    """Writes the folder: 32 wide, 2 layers, random weights."""
    tokenizer = llama1_tokenizer()
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
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
    LlamaForCausalLM(config).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "max_sequence_length": 2048}))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": True,
                "model_max_length": 2048,
                "padding_side": "right",
                **names,
            }
        )
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder
