"""Random models of every supported architecture in the published format, small and uneven: each switch is on
in at least one of them."""

from pathlib import Path

import torch
import transformers

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=42,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    pad_token_id=0,
    attn_implementation="eager",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
GEMMA = dict(head_dim=10, query_pre_attn_scalar=7, sliding_window=6)
# The caps are low enough to bend most scores.
CAPS = dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.5)

# Name -> (architecture, what differs from SIZES).
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama, one head per query, own head": (
        "Llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "llama, head size of its own, gelu": ("Llama", {"head_dim": 10, "hidden_act": "gelu"}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen 2": ("Qwen2", {}),
    "qwen 2, window from layer 1, own head": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": False,
        },
    ),
    "qwen 2, one head per query, linear rope": (
        "Qwen2",
        {"num_key_value_heads": 4, "rope_parameters": LINEAR_ROPE},
    ),
    "qwen 3": ("Qwen3", {"head_dim": 10}),
    "qwen 3, one head per query, llama 3 rope": (
        "Qwen3",
        {"head_dim": 10, "num_key_value_heads": 4, "rope_parameters": LLAMA3_ROPE},
    ),
    "qwen 3, biases, windows, one key head": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 6, "tie_word_embeddings": False}),
    "mistral without window, three heads per key": (
        "Mistral",
        {"sliding_window": None, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "mistral, one head per query, llama 3 rope": (
        "Mistral",
        {"sliding_window": 6, "num_key_value_heads": 4, "rope_parameters": LLAMA3_ROPE},
    ),
    "mistral, linear rope": ("Mistral", {"sliding_window": None, "rope_parameters": LINEAR_ROPE}),
    "gemma 2": ("Gemma2", {**GEMMA, **CAPS}),
    "gemma 2, biases, own head, no caps": (
        "Gemma2",
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "hidden_activation": "gelu",
        },
    ),
    "gemma 3": (
        "Gemma3",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma 3, one head per query, own head": (
        "Gemma3",
        {**GEMMA, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "gemma 3, scaled rope, final cap": (
        "Gemma3",
        {
            **GEMMA,
            "query_pre_attn_scalar": 10,
            "final_logit_softcapping": 2.5,
            "num_key_value_heads": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}


def write_model(folder: Path, name: str, **changes) -> transformers.PreTrainedModel:
    """Saves the variant `name` with `changes` to its config in `folder`; returns transformers' model.

    The model attends eagerly. Its weights are large enough that every norm, bias,
    cap and window shows in the logits.
    """
    family, differs = VARIANTS[name]
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    network = getattr(transformers, f"{family}ForCausalLM")(
        config_class(**{**SIZES, **differs, **changes})
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            # Vectors are norms, which keep their middle at 0 or 1, and biases.
            weight.copy_(0.25 * noise if weight.dim() == 2 else weight + 0.4 * noise)
    network.save_pretrained(folder)
    return network
