"""Hugging Face tensor names of the decoder's weights."""

from torch import Tensor

from engine.model.decoder import Decoder


def named_targets(model: Decoder) -> dict[str, Tensor]:
    """Hugging Face tensor names -> views of this model's weights."""
    c, named = model.config, {"model.embed_tokens.weight": model.embed.data, "model.norm.weight": model.norm.data}
    if model.head is not None:
        named["lm_head.weight"] = model.head.data
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for i, layer in enumerate(model.layers):
        prefix, own = f"model.layers.{i}.", {}
        for kind, qkv, gate_up, o, down in (
            ("weight", layer.qkv, layer.gate_up, layer.o, layer.down),
            ("bias", layer.qkv_bias, layer.gate_up_bias, layer.o_bias, layer.down_bias),
        ):
            q_part, k_part, v_part = (None,) * 3 if qkv is None else qkv.split([q, kv, kv])
            gate, up = (None,) * 2 if gate_up is None else gate_up.chunk(2)
            own |= {f"self_attn.q_proj.{kind}": q_part, f"self_attn.k_proj.{kind}": k_part, f"self_attn.v_proj.{kind}": v_part}
            own |= {f"self_attn.o_proj.{kind}": o, f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up, f"mlp.down_proj.{kind}": down}
        own |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm, "input_layernorm.weight": layer.norm1}
        if c.gemma:
            own |= {
                "post_attention_layernorm.weight": layer.after_attention,
                "pre_feedforward_layernorm.weight": layer.norm2,
                "post_feedforward_layernorm.weight": layer.after_mlp,
            }
        else:
            own["post_attention_layernorm.weight"] = layer.norm2
        named |= {prefix + name: weight.data for name, weight in own.items() if weight is not None}
    return named
