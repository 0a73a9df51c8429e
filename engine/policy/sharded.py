"""Full fine-tuning on several ranks: each has some rows of all weights, and of their optimizer's states.

`engine.model.parallel` spreads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from engine.model.decoder import Decoder
from engine.model.parallel import gathered, trainable
from engine.policy.parameters import PolicyWeights


class ShardedWeights(PolicyWeights):
    """Trainable copies of all weights of a spread decoder, `engine.policy.full.FullWeights` on several ranks:
    the names and their order are the same, the values are `DTensor`s.

    compute: dtype that passes compute in, by default that of the decoder.
    """

    def __init__(self, network: Decoder, compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.compute_dtype = compute or network.dtype
        spread = trainable(network, self.compute_dtype)
        # These parameters stay, while the decoder's change to gathered ones and back.
        named = {name.replace(".", "|"): value for name, value in spread.named_parameters()}
        self.masters = nn.ParameterDict(named)
        # A list hides the decoder from nn.Module, which would count its weights as parameters too.
        self._spread = [spread]

    def decoder(self) -> Decoder:
        """Returns the decoder with these weights, whose passes all ranks take together; its gradients reach
        each rank's rows, summed over the ranks."""
        return self._spread[0]

    @property
    def place(self) -> int | None:
        """The number of this rank's rows among those of all weights; None where no other rank has the same
        ones."""
        mesh = next(self.parameters()).device_mesh
        return None if mesh.ndim == 1 else mesh.get_coordinate()[-1]

    def pass_nothing(self, *, gradients: bool, checkpointed: bool = False) -> None:
        """Takes a pass that adds nothing to the gradients, beside another rank that has more to compute."""
        network = self.decoder()
        token, ends = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
        with torch.set_grad_enabled(gradients):
            states = network(token.to(network.device), ends, checkpointed=checkpointed)
            if gradients:
                (0 * states.sum() + 0 * network.head_weight.sum()).backward()


@dataclass(frozen=True)
class GatheredWeights:
    """All weights of a policy, in the dtype that it computes in, for what needs no gradient."""

    network: Decoder

    def decoder(self) -> Decoder:
        """Returns the decoder with these weights."""
        return self.network


@contextmanager
def gathered_weights(weights: ShardedWeights) -> Iterator[GatheredWeights]:
    """Gives all weights of a policy to each rank for a while. All ranks enter together."""
    with gathered(weights.decoder()) as network:
        yield GatheredWeights(network)
