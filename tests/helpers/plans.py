"""The small model whose plans are tested."""

from engine.model.architecture import ModelConfig, Rope

SHAPE = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
    rms_eps=1e-6,
    tied=True,
    rope=Rope(theta=1e4),
)
