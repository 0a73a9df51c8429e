"""A shape for `bench.run` that takes no time."""

from bench.run.shapes import Sizes, config_json

TINY = config_json("Qwen2", Sizes(2, 32, 4, 2, 48, 384), 1e4, 256)
