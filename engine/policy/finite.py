"""Says where a model's numbers cease to be finite. Nothing of this runs while they are."""

import torch
from torch import Tensor

from engine.errors import NonFiniteError
from engine.model.attention import Layout
from engine.model.decoder import Decoder
from engine.model.low_rank import LowRank


@torch.no_grad()
def stop_non_finite(
    network: Decoder, adapter: LowRank | None, tokens: Tensor, layout: Layout, *, reference: bool
) -> None:
    """Stops a run in which a NaN or infinite log-prob or state was found.

    It computes these packed sequences once more and looks at the states before and after each layer.

    reference: whether the network without `adapter` is the reference; else it is the policy.
    Raises: NonFiniteError that names the model and the first layer.
    """
    bad: list[int] = []

    def tap(layer: int, states: Tensor) -> None:
        if not states.isfinite().all():
            bad.append(layer)

    hidden = network(tokens, layout, adapter=adapter, tap=tap)
    count, who = network.config.num_layers, "the reference" if reference else "the policy"
    if bad and bad[0]:
        place = f"in layer {bad[0]} of {count}"
    elif bad:
        place = "in the embedding"
    elif not hidden.isfinite().all():
        place = f"in the norm behind the {count} layers"
    else:
        place = "in its logits"
    dtype = str(network.dtype).removeprefix("torch.")
    cure = "use --dtype bfloat16 or float32" if dtype == "float16" else "check the weights of --model"
    if not reference:
        cure = "lower --learning-rate, or use --dtype float32"
    raise NonFiniteError(f"{who} computes numbers that are not finite, first {place} ({dtype}): {cure}.")
