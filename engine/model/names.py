"""The names of weights: the decoder's, Hugging Face's and GGUF's.

The decoder fuses matrices that read the same input, the files do not.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from engine.model.architecture import ModelConfig


class Weight(NamedTuple):
    """A weight as Hugging Face stores it."""

    parameter: str  # the decoder's, which is this weight or holds it as some of its rows
    name: str  # Hugging Face's, without "model.layers.3." and ".weight"
    gguf: str  # the name in a GGUF file, without "blk.3." and ".weight"; "" where no such file is read


OUTER = (
    Weight("embed", "model.embed_tokens", "token_embd"),
    Weight("norm", "model.norm", "output_norm"),
    Weight("head", "lm_head", "output"),
)
# The layer of a Llama. The parts of a fused matrix stand in the order of its rows.
LAYER = (
    Weight("norm1", "input_layernorm", "attn_norm"),
    Weight("qkv", "self_attn.q_proj", "attn_q"),
    Weight("qkv", "self_attn.k_proj", "attn_k"),
    Weight("qkv", "self_attn.v_proj", "attn_v"),
    Weight("o", "self_attn.o_proj", "attn_output"),
    Weight("norm2", "post_attention_layernorm", "ffn_norm"),
    Weight("gate_up", "mlp.gate_proj", "ffn_gate"),
    Weight("gate_up", "mlp.up_proj", "ffn_up"),
    Weight("down", "mlp.down_proj", "ffn_down"),
)
QK_NORMS = (Weight("q_norm", "self_attn.q_norm", ""), Weight("k_norm", "self_attn.k_norm", ""))
# With norms after the blocks too, the second of a Llama's names means another norm.
NORMS_AFTER_BLOCKS = (
    Weight("after_attention", "post_attention_layernorm", ""),
    Weight("norm2", "pre_feedforward_layernorm", ""),
    Weight("after_mlp", "post_feedforward_layernorm", ""),
)
# The decoder's matrix -> the names of the linears in it, in the order of its rows.
FUSED = {
    matrix: tuple(weight.name for weight in LAYER if weight.parameter == matrix)
    for matrix in ("qkv", "o", "gate_up", "down")
}
# Of a decoder in slices these are cut by columns, and the others by rows; see `engine.model.slices`.
CUT_BY_COLUMNS = ("o", "down")
LINEARS = tuple(name for names in FUSED.values() for name in names)


def linears_of(targets: Iterable[str]) -> tuple[str, ...]:
    """Returns the Hugging Face names of the linears that --lora-targets names."""
    return tuple(name for name in LINEARS if name.rpartition(".")[2].removesuffix("_proj") in set(targets))


def linear_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (out, in) features of each linear of a layer."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "self_attn.q_proj": (q, c.hidden_size),
        "self_attn.k_proj": (kv, c.hidden_size),
        "self_attn.v_proj": (kv, c.hidden_size),
        "self_attn.o_proj": (c.hidden_size, q),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size),
    }


class Place(NamedTuple):
    """Where a weight of Hugging Face stands in the decoder."""

    parameter: str  # with its path, such as "layers.3.qkv"
    first_row: int
    rows: int | None  # None: it is the whole parameter


def places(parameters: Iterable[str], c: ModelConfig) -> dict[str, Place]:
    """Finds the weights of Hugging Face that a decoder's parameters hold, by their names there."""
    shapes = linear_shapes(c)
    layer = LAYER + QK_NORMS
    if c.norms_after_blocks:
        layer = tuple(weight for weight in layer if weight.parameter != "norm2") + NORMS_AFTER_BLOCKS
    found = {}
    for key in parameters:
        path, _, parameter = key.rpartition(".")
        kind = "bias" if parameter.endswith("_bias") else "weight"
        prefix, weights = (f"model.{path}.", layer) if path else ("", OUTER)
        names = [weight.name for weight in weights if weight.parameter == parameter.removesuffix("_bias")]
        first = 0
        for name in names:
            rows = shapes[name][0] if len(names) > 1 else None
            found[f"{prefix}{name}.{kind}"] = Place(key, first, rows)
            first += rows or 0
    return found


def to_hugging_face(state: dict[str, Tensor], c: ModelConfig) -> dict[str, Tensor]:
    """Splits the tensors of a decoder's `state_dict()` into Hugging Face's, by name.

    They are views: what is copied into them is loaded into the decoder, without a second copy of its weights.
    """
    return {
        name: state[key] if rows is None else state[key].narrow(0, first, rows)
        for name, (key, first, rows) in places(state, c).items()
    }


def from_gguf(name: str) -> str:
    """Returns the Hugging Face name of a tensor of a Llama's GGUF file."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_row(OUTER, 'gguf', stem).name}.{kind}"
    _, layer, inner = stem.split(".")
    return f"model.layers.{layer}.{_row(LAYER, 'gguf', inner).name}.{kind}"


def to_gguf(name: str) -> str:
    """Returns the GGUF name of a tensor of a Llama's Hugging Face checkpoint."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_row(OUTER, 'name', stem).gguf}.{kind}"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_row(LAYER, 'name', inner).gguf}.{kind}"


def _row(weights: tuple[Weight, ...], field: str, value: str) -> Weight:
    return next(weight for weight in weights if getattr(weight, field) == value)
