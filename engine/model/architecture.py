"""Sizes and switches of a decoder."""

from dataclasses import dataclass
from pathlib import Path

from engine.model import families
from engine.model.rope import Rope


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
    local_rope: Rope | None = None  # of the layers with a window, where it differs from `rope` (Gemma 3)
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
    scaled_embeddings: bool = False  # embeddings are multiplied by sqrt(hidden_size) (Gemma)
    norms_add_one: bool = False  # norms multiply by 1 + weight (Gemma)
    norms_after_blocks: bool = False  # attention and the MLP are each followed by a norm too (Gemma)

    @staticmethod
    def from_json(raw: dict, file: Path) -> "ModelConfig":
        """Reads a config.json. Where a key is missing its default is the one of transformers.

        Raises: UserError naming the architecture or switch that is not supported, the key that is missing, or
        the value that cannot be.
        """
        return ModelConfig(**families.sizes_and_switches(raw, file))

    def window_of(self, layer: int) -> int | None:
        """Returns how many tokens a token of this layer sees, itself included; None = all before it."""
        return self.window if layer in self.window_layers else None

    def parameter_count(self) -> int:
        """Counts the weights, the head once when it is tied."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * 2 * (q + kv) + 3 * self.hidden_size * self.intermediate_size
        layer += (4 if self.norms_after_blocks else 2) * self.hidden_size + (
            2 * self.head_dim if self.qk_norm else 0
        )
        layer += self.qkv_bias * (q + 2 * kv) + self.o_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return (
            self.num_layers * layer
            + self.hidden_size
            + self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        )
