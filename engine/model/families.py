"""From the config.json of each family of models to the decoder's sizes and switches.

Every key that is read is taken out of the file's contents. What is left at the end is a switch that this
engine does not know: it is refused by name, never ignored.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.files import shown
from engine.model.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# The parameters of each kind of rotary positions.
ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# These keys leave log-probs as they are.
METADATA = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
    "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation",
    "initializer_range", "pretraining_tp", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "return_dict", "id2label", "label2id", "problem_type", "tokenizer_class",
    "is_llama_config", "unsloth_version", "unsloth_fixed", "max_length", "do_sample", "temperature", "top_p",
    "top_k",
    # Early conversions of LLaMA write this one beside max_position_embeddings, and nothing reads it.
    "max_sequence_length",
    # Gemma 3 writes this one beside layer_types, which say the same, and nothing reads it.
    "_sliding_window_pattern",
}  # fmt: skip
# Published files also write these keys of other families, of training and of sampling; at these values they
# leave log-probs as they are.
HARMLESS = {
    "attention_bias": False, "mlp_bias": False, "rope_interleaved": False, "use_mrope": False,
    "use_bidirectional_attention": False, "attention_dropout": 0, "hidden_dropout": 0, "embd_pdrop": 0,
    "resid_pdrop": 0, "gradient_checkpointing": False, "is_encoder_decoder": False, "is_decoder": False,
    "add_cross_attention": False, "tie_encoder_decoder": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "output_attentions": False, "output_hidden_states": False, "torchscript": False, "use_bfloat16": False,
    "tf_legacy_loss": False, "_flash_attn_2_enabled": False, "min_length": 0, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0, "early_stopping": False, "typical_p": 1,
    "repetition_penalty": 1, "length_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "remove_invalid_values": False,
}  # fmt: skip
# The values of these keys, where they are not null, must be whole numbers above 0, and at most these,
SIZES = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 10_000,
    "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14,
    "max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1, "sliding_window_pattern": 10_000,
}  # fmt: skip
# numbers above 0 and at most `LARGEST`,
NUMBERS = (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip
LARGEST = 1e18
# true or false,
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# and objects.
TABLES = ("rope_scaling", "rope_parameters")
# Every family needs these keys.
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class ConfigFile(NamedTuple):
    """A config.json that is being read."""

    file: Path
    rest: dict[str, Any]  # the keys that have not been read yet
    layers: int
    head_dim: int
    positions: int

    def take(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or `default` where it is missing. The key has been read then."""
        return self.rest.pop(key, default)

    def switch(self, key: str) -> bool:
        """Returns a switch that is off where it is missing or null."""
        return bool(self.take(key, False))


def _llama(config: ConfigFile) -> dict[str, Any]:
    """Reads a Llama of any version, or SmolLM2."""
    if config.rest.get("use_sliding_window") is False:
        config.take("use_sliding_window")
    bias = config.switch("attention_bias")
    return {
        "rope": _rope_everywhere(config),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": config.switch("mlp_bias"),
    }


def _qwen2(config: ConfigFile) -> dict[str, Any]:
    """Reads a Qwen 2 or 2.5."""
    return {"rope": _rope_everywhere(config), "qkv_bias": True, **_windows_from_a_layer_on(config)}


def _qwen3(config: ConfigFile) -> dict[str, Any]:
    """Reads a Qwen 3."""
    bias = config.switch("attention_bias")
    rope = _rope_everywhere(config)
    return {
        "rope": rope,
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        **_windows_from_a_layer_on(config),
    }


def _mistral(config: ConfigFile) -> dict[str, Any]:
    """Reads a Mistral, which has the same window in all layers, or none."""
    rope, window = _rope_everywhere(config), config.take("sliding_window", 4096)
    return {"rope": rope, **_windows(config, window, [window is not None] * config.layers)}


def _gemma2(config: ConfigFile) -> dict[str, Any]:
    """Reads a Gemma 2, in which every other layer has a window."""
    shared = _gemma(config)
    rope, window = _rope_everywhere(config), config.take("sliding_window", 4096)
    return {
        **shared,
        "rope": rope,
        "attention_softcap": config.take("attn_logit_softcapping", 50.0),
        "logit_softcap": config.take("final_logit_softcapping", 30.0),
        **_windows(config, window, _layer_types(config, _all_but_every(2, config.layers))),
    }


def _gemma3(config: ConfigFile) -> dict[str, Any]:
    """Reads the text model of a Gemma 3, whose layers with a window have rotary positions of another base.

    transformers does not apply its attn_logit_softcapping, so that must be off.
    """
    shared = _gemma(config)
    rope, local_rope = _rope_and_local_rope(config)
    window, period = config.take("sliding_window", 4096), config.take("sliding_window_pattern") or 6
    return {
        **shared,
        "rope": rope,
        "local_rope": local_rope,
        "qk_norm": True,
        "logit_softcap": config.take("final_logit_softcapping"),
        **_windows(config, window, _layer_types(config, _all_but_every(period, config.layers))),
    }


def _gemma(config: ConfigFile) -> dict[str, Any]:
    """Reads what Gemma 2 and 3 share."""
    bias, scalar = config.switch("attention_bias"), config.take("query_pre_attn_scalar")
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "attention_scale": None if scalar == config.head_dim else scalar**-0.5,
        "scaled_embeddings": True,
        "norms_add_one": True,
        "norms_after_blocks": True,
    }


class Family(NamedTuple):
    """One architecture: `read` takes its switches from a file, `needs` are the keys without a default."""

    model_type: str
    read: Callable[[ConfigFile], dict[str, Any]]
    needs: tuple[str, ...] = ()
    gemma: bool = False  # ties the head by default, and names its activation hidden_activation


_POSITIONS = "max_position_embeddings"
_GEMMA = (_POSITIONS, "num_key_value_heads", "head_dim", "query_pre_attn_scalar")
# Gemma3ForCausalLM is the text model alone.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", _llama),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2, (_POSITIONS,)),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3, (_POSITIONS, "head_dim")),
    "MistralForCausalLM": Family("mistral", _mistral, (_POSITIONS,)),
    "Gemma2ForCausalLM": Family("gemma2", _gemma2, _GEMMA, gemma=True),
    "Gemma3ForCausalLM": Family("gemma3_text", _gemma3, _GEMMA, gemma=True),
}


def sizes_and_switches(raw: dict, file: Path) -> dict[str, Any]:
    """Reads the fields of `engine.model.architecture.ModelConfig` from a config.json; see its `from_json`."""
    architecture = _architecture(raw, file)
    family = FAMILIES[architecture]
    missing = [key for key in NEEDED + family.needs if raw.get(key) is None]
    if missing:
        raise UserError(f"{file}: {missing[0]} is missing; fetch the file again.")
    _check_values(raw, file)

    rest = {key: value for key, value in raw.items() if key not in METADATA}
    heads, layers, hidden_size = (
        rest.pop(k) for k in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    kv_heads = rest.pop("num_key_value_heads", None) or heads
    head_dim = rest.pop("head_dim", None) or hidden_size // heads
    positions = rest.pop("max_position_embeddings", None) or 2048
    if heads % kv_heads or head_dim % 2 or head_dim < 2:
        raise UserError(
            f"{file}: {heads} heads of size {head_dim} with {kv_heads} key heads do not fit; "
            "fetch the file again."
        )
    activation = rest.pop("hidden_act", None) or "silu"
    if family.gemma:
        # Its files have hidden_act too, which counts for nothing.
        activation = rest.pop("hidden_activation", None) or "gelu_pytorch_tanh"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: activation {shown(str(activation)[:60])} is not supported; "
            f"{', '.join(ACTIVATIONS)} are."
        )
    switches = family.read(ConfigFile(file, rest, layers, head_dim, positions))
    fields = {
        "vocab_size": rest.pop("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": rest.pop("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": positions,
        "rms_eps": rest.pop("rms_norm_eps", None) or 1e-6,
        "tied": bool(rest.pop("tie_word_embeddings", family.gemma)),
        "activation": activation,
        **switches,
    }
    for key, value in rest.items():
        if value is not None and not (key in HARMLESS and HARMLESS[key] == value):
            raise UserError(
                f"{file}: {shown(key)} {shown(str(value)[:60])} is not supported for {architecture}; "
                "use a checkpoint without it."
            )
    return fields


def _architecture(raw: dict, file: Path) -> str:
    """Returns the name in `FAMILIES` that a config.json gives, by model_type where it has no architectures.

    Raises: UserError where there is none, or where the two are of different families: transformers would load
    the other one.
    """
    of_type = {family.model_type: name for name, family in FAMILIES.items()}
    named, kind = raw.get("architectures"), raw.get("model_type")
    named = named[0] if named and isinstance(named, list) else named
    by_type = of_type.get(kind) if isinstance(kind, str) else None
    if not named and by_type is not None:
        return by_type
    if not isinstance(named, str) or named not in FAMILIES:
        given = f"architecture {named}" if named else f"model_type {kind}"
        raise UserError(f"{file}: {shown(given[:80])} is not supported; use one of {', '.join(FAMILIES)}.")
    if kind is not None and named != by_type:
        raise UserError(
            f"{file}: architectures says {named}, model_type says {kind!r:.60}; "
            "correct the one that is wrong."
        )
    return named


def _check_values(raw: dict, file: Path) -> None:
    """Checks the values of the keys that are read. Raises: UserError with the first one that cannot be."""
    for key, most in SIZES.items():
        value = raw.get(key)
        if value is not None and not (type(value) is int and 0 < value <= most):
            raise UserError(
                f"{file}: {key} is {value!r:.60}; it must be a whole number above 0 and at most {most}: "
                "fetch the file again."
            )
    for keys, fits, wanted in (
        (NUMBERS, _is_positive, f"a number above 0 and at most {LARGEST:g}"),
        (SWITCHES, lambda value: isinstance(value, bool), "true or false"),
        (TABLES, lambda value: isinstance(value, dict), "an object"),
    ):
        for key in keys:
            value = raw.get(key)
            if value is not None and not fits(value):
                raise UserError(f"{file}: {key} is {value!r:.60}; it must be {wanted}: fetch the file again.")


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST


def _rope_everywhere(config: ConfigFile) -> Rope:
    """Reads rotary positions that are the same in all layers."""
    scaling, parameters = config.take("rope_scaling") or {}, config.take("rope_parameters") or {}
    return _rope(scaling or parameters, config.take("rope_theta") or 10_000.0, config)


def _rope_and_local_rope(config: ConfigFile) -> tuple[Rope, Rope]:
    """Reads Gemma 3's rotary positions: of the layers that see everything, and of those with a window."""
    scaling, parameters = config.take("rope_scaling") or {}, config.take("rope_parameters") or {}
    theta, local_theta = config.take("rope_theta"), config.take("rope_local_base_freq")
    unknown = sorted(set(parameters) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(
            f"{config.file}: rope_parameters {unknown[0]} is not supported; Gemma 3 has full_attention and "
            "sliding_attention there."
        )
    for key, value in parameters.items():
        if not isinstance(value, dict | None):
            raise UserError(
                f"{config.file}: rope_parameters {key} is {value!r:.60}; it must be an object: "
                "fetch the file again."
            )
    full, local = ({**(parameters.get(key) or {})} for key in ("full_attention", "sliding_attention"))
    return _rope({**full, **scaling}, theta or 1_000_000.0, config), _rope(
        local, local_theta or 10_000.0, config
    )


def _rope(given: dict, theta: float, config: ConfigFile) -> Rope:
    """Reads one entry of rope_parameters, or rope_scaling. A rope_theta in it counts before `theta`."""
    given, file = dict(given), config.file
    old_name = given.pop("type", None)
    kind, theta = (
        given.pop("rope_type", None) or old_name or "default",
        given.pop("rope_theta", None) or theta,
    )
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise UserError(
            f"{file}: rope type {shown(str(kind)[:60])} is not supported; {', '.join(ROPE_KINDS)} are."
        )
    if given.pop("partial_rotary_factor", None) not in (None, 1):
        raise UserError(
            f"{file}: partial_rotary_factor other than 1 is not supported; use a checkpoint without it."
        )
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", config.positions)
    parameters = {key: given.pop(key, None) for key in ROPE_KINDS[kind]}
    missing = [key for key, value in parameters.items() if value is None]
    if missing:
        raise UserError(f"{file}: rope type {kind} lacks {missing[0]}; fetch the file again.")
    for key, value in {"rope_theta": theta, **parameters}.items():
        if not _is_positive(value):
            raise UserError(
                f"{file}: {key} of rope type {kind} is {value!r:.60}; it must be a number above 0 and at "
                f"most {LARGEST:g}: fetch the file again."
            )
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise UserError(
            f"{file}: high_freq_factor of rope type llama3 must be above low_freq_factor; "
            "fetch the file again."
        )
    for key, value in given.items():
        if value is not None:
            raise UserError(
                f"{file}: {key} of rope type {kind} is not supported; use a checkpoint without it."
            )
    return Rope(theta=float(theta), scaling={**parameters, "rope_type": kind} if parameters else None)


def _windows_from_a_layer_on(config: ConfigFile) -> dict[str, Any]:
    """Reads Qwen's windows, which begin at layer max_window_layers."""
    window = config.take("sliding_window", 4096)
    used, first = config.take("use_sliding_window", False), config.take("max_window_layers", 28)
    if type(first) is not int:
        raise UserError(
            f"{config.file}: max_window_layers is {first!r:.60}; it must be a whole number: "
            "fetch the file again."
        )
    sliding = [bool(used) and window is not None and layer >= first for layer in range(config.layers)]
    return _windows(config, window if used else None, _layer_types(config, sliding))


def _all_but_every(period: int, layers: int) -> list[bool]:
    """Returns which layers have a window where each layer number `period` has none."""
    return [(layer + 1) % period != 0 for layer in range(layers)]


def _layer_types(config: ConfigFile, sliding: list[bool]) -> list[bool]:
    """Reads which layers have a window; `sliding` where the file does not list them."""
    kinds = config.take("layer_types")
    if kinds is None:
        return sliding
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != config.layers or not all(k in known for k in kinds):
        raise UserError(
            f"{config.file}: layer_types must be {config.layers} of full_attention and sliding_attention; "
            "fetch the file again."
        )
    return [kind == "sliding_attention" for kind in kinds]


def _windows(config: ConfigFile, window: int | None, sliding: list[bool]) -> dict[str, Any]:
    """Returns the fields of the sliding window; none where no layer has it."""
    chosen = tuple(layer for layer in range(config.layers) if sliding[layer])
    if chosen and not (isinstance(window, int) and window > 0):
        raise UserError(
            f"{config.file}: layers with sliding_attention, but sliding_window is {window}; "
            "fetch the file again."
        )
    return {"window": window, "window_layers": chosen} if chosen else {}
