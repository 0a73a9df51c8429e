"""What a Hugging Face config.json says of a decoder. A switch that is not known here is refused by name, never ignored."""

import math
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError

# Llama includes SmolLM2; Qwen2 includes Qwen2.5; Gemma3ForCausalLM is the text model alone.
ARCHITECTURES = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# Parameters of each kind of rotary positions.
ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Keys that leave log-probs as they are.
METADATA = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "transformers.js_config", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "initializer_range", "pretraining_tp",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "return_dict", "id2label", "label2id", "problem_type",
    "tokenizer_class", "is_llama_config", "unsloth_version", "unsloth_fixed", "max_length", "do_sample", "temperature", "top_p", "top_k",
    # Gemma 3: written beside layer_types, which say the same, and never read.
    "_sliding_window_pattern",
}  # fmt: skip
# Keys that leave log-probs as they are at this value, which published files write: of other families, of training, of sampling.
HARMLESS = {
    "attention_bias": False, "mlp_bias": False, "rope_interleaved": False, "use_mrope": False, "use_bidirectional_attention": False,
    "attention_dropout": 0, "hidden_dropout": 0, "embd_pdrop": 0, "resid_pdrop": 0, "gradient_checkpointing": False,
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "output_attentions": False, "output_hidden_states": False, "torchscript": False, "use_bfloat16": False,
    "tf_legacy_loss": False, "_flash_attn_2_enabled": False, "min_length": 0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0,
    "early_stopping": False, "typical_p": 1, "repetition_penalty": 1, "length_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
    "remove_invalid_values": False,
}  # fmt: skip
# What the values of keys that are read must be, where they are not null.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "sliding_window", "sliding_window_pattern",
)  # fmt: skip
NUMBERS = (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
TABLES = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: their base, and how wavelengths are scaled."""

    theta: float
    scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", and its parameters}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder. The defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float
    tied: bool
    rope: Rope
    local_rope: Rope | None = None  # Gemma 3: that of the layers with a window
    window: int | None = None  # a token sees this many, itself included, in `window_layers`
    window_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # norms over each head of q and k, before the rotation
    activation: str = "silu"
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    # Gemma: embeddings times sqrt(hidden_size), norms times 1 + weight, and a norm after attention and after the MLP too.
    gemma: bool = False

    @staticmethod
    def from_json(raw: dict, file: Path) -> "ModelConfig":
        """Read a config.json. Where a key is missing its default is the one of transformers.

        Raises: UserError naming the architecture or switch that is not supported, the key that is missing, or the value that cannot be.
        """
        named = raw.get("architectures") or raw.get("model_type", "unknown")
        architecture = named[0] if isinstance(named, list) else named
        if architecture not in ARCHITECTURES:
            raise UserError(f"{file}: architecture {architecture} is not supported; use one of {', '.join(ARCHITECTURES)}.")
        family = architecture.removesuffix("ForCausalLM")
        gemma = family in ("Gemma2", "Gemma3")
        needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        needed += [] if family == "Llama" else ["max_position_embeddings"]
        needed += ["num_key_value_heads", "head_dim", "query_pre_attn_scalar"] if gemma else []
        needed += ["head_dim"] if family == "Qwen3" else []
        missing = [key for key in needed if raw.get(key) is None]
        if missing:
            raise UserError(f"{file}: {missing[0]} is missing; fetch the file again.")
        _check_values(raw, file)

        # What is read is taken out; what is left at the end is unknown.
        rest = {key: value for key, value in raw.items() if key not in METADATA}
        heads, layers, hidden_size = (rest.pop(key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
        kv_heads, head_dim = rest.pop("num_key_value_heads", None) or heads, rest.pop("head_dim", None) or hidden_size // heads
        positions = rest.pop("max_position_embeddings", None) or 2048
        if heads % kv_heads or head_dim % 2:
            raise UserError(f"{file}: {heads} heads of size {head_dim} with {kv_heads} key heads do not fit; fetch the file again.")
        # Gemma has hidden_act too; what counts is hidden_activation.
        activation = rest.pop("hidden_act", None) or "silu"
        if gemma:
            activation = rest.pop("hidden_activation", None) or "gelu_pytorch_tanh"
        if activation not in ACTIVATIONS:
            raise UserError(f"{file}: activation {activation} is not supported; {', '.join(ACTIVATIONS)} are.")
        bias = family not in ("Qwen2", "Mistral") and bool(rest.pop("attention_bias", False))
        scalar = rest.pop("query_pre_attn_scalar") if gemma else head_dim
        rope, local_rope = _ropes(rest, family, positions, file)
        window, window_layers = _windows(rest, family, layers, file)
        config = ModelConfig(
            vocab_size=rest.pop("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=rest.pop("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=positions,
            rms_eps=rest.pop("rms_norm_eps", None) or 1e-6,
            tied=bool(rest.pop("tie_word_embeddings", gemma)),
            rope=rope,
            local_rope=local_rope,
            window=window,
            window_layers=window_layers,
            qkv_bias=bias or family == "Qwen2",
            o_bias=bias,
            mlp_bias=family == "Llama" and bool(rest.pop("mlp_bias", False)),
            qk_norm=family in ("Qwen3", "Gemma3"),
            activation=activation,
            attention_scale=None if scalar == head_dim else scalar**-0.5,
            # transformers does not apply Gemma 3's, so there it must be off.
            attention_softcap=rest.pop("attn_logit_softcapping", 50.0) if family == "Gemma2" else None,
            logit_softcap=rest.pop("final_logit_softcapping", 30.0 if family == "Gemma2" else None) if gemma else None,
            gemma=gemma,
        )
        for key, value in rest.items():
            if value is not None and not (key in HARMLESS and HARMLESS[key] == value):
                raise UserError(f"{file}: {key} {str(value)[:60]} is not supported for {architecture}; use a checkpoint without it.")
        return config

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None = all before it."""
        return self.window if layer in self.window_layers else None

    def parameter_count(self) -> int:
        """Number of weights, the head counted once when it is tied."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * 2 * (q + kv) + 3 * self.hidden_size * self.intermediate_size
        layer += (4 if self.gemma else 2) * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layer += self.qkv_bias * (q + 2 * kv) + self.o_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return self.num_layers * layer + self.hidden_size + self.vocab_size * self.hidden_size * (1 if self.tied else 2)


def _check_values(raw: dict, file: Path) -> None:
    for key in SIZES:
        value = raw.get(key)
        if value is not None and not (type(value) is int and 0 < value < 2**31):
            raise UserError(f"{file}: {key} is {value!r:.60}; it must be a whole number above 0: fetch the file again.")
    for key in NUMBERS:
        if raw.get(key) is not None and not _is_positive(raw[key]):
            raise UserError(f"{file}: {key} is {raw[key]!r:.60}; it must be a number above 0: fetch the file again.")
    for key in SWITCHES:
        if not isinstance(raw.get(key), bool | None):
            raise UserError(f"{file}: {key} is {raw[key]!r:.60}; it must be true or false: fetch the file again.")
    for key in TABLES:
        if not isinstance(raw.get(key), dict | None):
            raise UserError(f"{file}: {key} is {raw[key]!r:.60}; it must be an object: fetch the file again.")


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _ropes(rest: dict, family: str, positions: int, file: Path) -> tuple[Rope, Rope | None]:
    """Rotary positions of all layers, and of the layers with a window where these have their own; their keys are taken out of `rest`."""
    scaling, parameters = rest.pop("rope_scaling", None) or {}, rest.pop("rope_parameters", None) or {}
    theta = rest.pop("rope_theta", None)
    if family != "Gemma3":
        return _rope(scaling or parameters, theta or 10_000.0, positions, file), None
    unknown = sorted(set(parameters) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(f"{file}: rope_parameters {unknown[0]} is not supported; Gemma 3 has full_attention and sliding_attention there.")
    for key, value in parameters.items():
        if not isinstance(value, dict | None):
            raise UserError(f"{file}: rope_parameters {key} is {value!r:.60}; it must be an object: fetch the file again.")
    everywhere = {**(parameters.get("full_attention") or {}), **scaling}
    local, local_theta = parameters.get("sliding_attention") or {}, rest.pop("rope_local_base_freq", None)
    return _rope(everywhere, theta or 1_000_000.0, positions, file), _rope(local, local_theta or 10_000.0, positions, file)


def _rope(given: dict, theta: float, positions: int, file: Path) -> Rope:
    """One entry of rope_parameters, or rope_scaling; its own rope_theta counts before `theta`."""
    given = dict(given)
    old_name = given.pop("type", None)
    kind, theta = given.pop("rope_type", None) or old_name or "default", given.pop("rope_theta", None) or theta
    if kind not in ROPE_KINDS:
        raise UserError(f"{file}: rope type {kind} is not supported; {', '.join(ROPE_KINDS)} are.")
    if given.pop("partial_rotary_factor", None) not in (None, 1):
        raise UserError(f"{file}: partial_rotary_factor other than 1 is not supported; use a checkpoint without it.")
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", positions)
    parameters = {key: given.pop(key, None) for key in ROPE_KINDS[kind]}
    if None in parameters.values():
        raise UserError(f"{file}: rope type {kind} lacks {[k for k, v in parameters.items() if v is None][0]}; fetch the file again.")
    for key, value in {"rope_theta": theta, **parameters}.items():
        if not _is_positive(value):
            raise UserError(f"{file}: {key} of rope type {kind} is {value!r:.60}; it must be a number above 0: fetch the file again.")
    for key, value in given.items():
        if value is not None:
            raise UserError(f"{file}: {key} of rope type {kind} is not supported; use a checkpoint without it.")
    return Rope(theta=float(theta), scaling={**parameters, "rope_type": kind} if parameters else None)


def _windows(rest: dict, family: str, layers: int, file: Path) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers that have it; their keys are taken out of `rest`."""
    if family == "Llama":
        if rest.get("use_sliding_window") is False:
            del rest["use_sliding_window"]
        return None, ()
    window = rest.pop("sliding_window", 4096)
    if family == "Mistral":
        sliding = [window is not None] * layers
    elif family in ("Qwen2", "Qwen3"):
        used, first = rest.pop("use_sliding_window", False), rest.pop("max_window_layers", 28)
        if type(first) is not int:
            raise UserError(f"{file}: max_window_layers is {first!r:.60}; it must be a whole number: fetch the file again.")
        window = window if used else None
        sliding = [window is not None and layer >= first for layer in range(layers)]
    else:
        period = 2 if family == "Gemma2" else rest.pop("sliding_window_pattern", None) or 6
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
    kinds = None if family == "Mistral" else rest.pop("layer_types", None)
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise UserError(f"{file}: layer_types must be {layers} of full_attention and sliding_attention; fetch the file again.")
        sliding = [kind == "sliding_attention" for kind in kinds]
    chosen = tuple(layer for layer in range(layers) if sliding[layer])
    if chosen and not (isinstance(window, int) and window > 0):
        raise UserError(f"{file}: layers with sliding_attention, but sliding_window is {window}; fetch the file again.")
    return (window, chosen) if chosen else (None, ())
