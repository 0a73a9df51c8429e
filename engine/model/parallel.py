"""A decoder that is spread over ranks by PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each rank holds some rows of every weight. A pass with gradients gathers the weights layer by layer, and adds
the gradients up over the ranks, so all ranks take the same number of passes, together. What needs no gradient
runs on a decoder that has all weights for a while (`gathered`), and no rank waits for another there.

PyTorch's modules for this take more than half a second to import, so only what spreads something imports
them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.model.architecture import ModelConfig
from engine.model.checkpoint import Checkpoint, examine
from engine.model.decoder import Decoder, inverse_frequencies
from engine.model.folder import fill, to_stderr
from engine.model.names import places
from engine.ranks import Ranks, connected

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def mesh_of(ranks: Ranks, device: torch.device, copies: int = 1) -> "DeviceMesh":
    """Arranges the ranks: the weights are spread over each row of `copies` rows, and are the same in all.

    A row is of ranks in their order, so with one for each machine the weights stay within a machine, and
    only sums of gradients go between them. With 1 they are spread over all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if copies == 1:
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shards",))
    shape = copies, ranks.size // copies
    return init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards"))


def is_spread(value: nn.Module | Tensor) -> bool:
    """Tells whether a decoder, a layer or a tensor is spread over ranks. Where nothing has imported PyTorch's
    classes for that, nothing is."""
    tensor, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    if isinstance(value, Tensor):
        return tensor is not None and isinstance(value, tensor.DTensor)
    return fsdp is not None and isinstance(value, fsdp.FSDPModule)


def spread(
    config: ModelConfig,
    raw_config: dict,
    mesh: "DeviceMesh",
    *,
    kept: torch.dtype,
    compute: torch.dtype,
    trained: bool,
) -> Decoder:
    """Returns a decoder that is spread over the ranks, whose weights have no values yet.

    kept: dtype of this rank's rows. compute: dtype of the gathered weights; gradients of `trained` ones are
    added up in float32, unless they are float64.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    network = Decoder(config, raw_config, compute, torch.device("meta"))
    for module in network.modules():
        for name, value in module.named_parameters(recurse=False):
            empty = torch.empty_like(value, dtype=kept)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=trained))
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute,
            reduce_dtype=torch.promote_types(compute, torch.float32),
            cast_forward_inputs=False,
        ),
    }
    for layer in network.layers:
        fully_shard(layer, reshard_after_forward=True, **options)
    # Embedding, norm and head stay until the backward pass begins, which needs them first.
    fully_shard(network, reshard_after_forward=False, **options)
    for module in _groups(network):
        # A rank's loss is its share of the whole step's already, so gradients are summed; by default FSDP
        # takes their mean.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    network.to_empty(device=mesh.device_type)
    network.inverse_frequency = inverse_frequencies(config).to(network.device)
    return network


def load_spread(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    copies: int = 1,
    say: Callable[[str], None] = to_stderr,
) -> Decoder:
    """Loads the frozen decoder of a model folder, spread over the ranks: each reads its rows alone.

    copies: see `mesh_of`. Raises: UserError as `engine.model.folder.load`, on all ranks what the first of
    them finds.
    """
    checkpoint = examine(folder)
    for sentence in checkpoint.remarks if ranks.is_first else ():
        say(sentence)
    network = spread(
        checkpoint.config,
        checkpoint.raw_config,
        mesh_of(ranks, device, copies),
        kept=dtype,
        compute=dtype,
        trained=False,
    )
    ranks.agreed(lambda: fill(checkpoint, _rows_to_read(network, checkpoint)))
    return network


def trainable(network: Decoder, compute: torch.dtype) -> Decoder:
    """Returns a copy of a spread decoder whose weights are trained.

    They are float32 unless the model is float64: 16-bit weights would lose most of a step. compute: dtype
    that passes compute in.
    """
    weights = dict(network.named_parameters())
    other = spread(
        network.config,
        network.raw_config,
        weights["embed"].device_mesh,
        kept=torch.promote_types(compute, torch.float32),
        compute=compute,
        trained=True,
    )
    with torch.no_grad():
        for name, value in other.named_parameters():
            value.to_local().copy_(weights[name].to_local())
    return other


@contextmanager
def gathered(network: Decoder) -> Iterator[Decoder]:
    """Gives a decoder with all weights of a spread one, in the dtype that it computes in; they are freed at
    the end. All ranks enter together. A decoder that is not spread is given as it is."""
    if not is_spread(network):
        yield network
        return
    whole = Decoder(network.config, network.raw_config, network.dtype, torch.device("meta"))
    whole.embed_scale, whole.inverse_frequency = network.embed_scale, network.inverse_frequency
    groups = _groups(network)
    try:
        with connected():
            for module in groups:
                module.unshard()
        for name, value in network.named_parameters():
            path, _, leaf = name.rpartition(".")
            # Past the hooks of the spread decoder, so that a decoding step is that of any other decoder.
            whole.get_submodule(path)._parameters[leaf] = value.detach()
        yield whole
    finally:
        for module in whole.modules():
            module._parameters.clear()
        for module in groups:
            module.reshard()


def rows_here(weight: Tensor) -> Tensor:
    """Returns this rank's rows of a spread weight, as a view; any other tensor is here as a whole."""
    return weight.to_local() if is_spread(weight) else weight


def first_row(weight: "DTensor") -> int:
    """Returns the number of this rank's first row among those of the whole weight.

    FSDP2 cuts rows as `torch.chunk` does: as many for each rank, rounded up, and what is left for the last
    ones, which may have none.
    """
    mesh, rows = weight.device_mesh, weight.shape[0]
    each = -(-rows // mesh.size(mesh.ndim - 1))
    return min(rows, each * mesh.get_coordinate()[-1])


def _rows_to_read(network: Decoder, checkpoint: Checkpoint) -> dict[str, tuple[Tensor, tuple[slice]]]:
    """Finds where this rank's rows stand in the files: for each name of Hugging Face, the weight's part that
    they go to, and their numbers there. Of a fused matrix they may be rows of several tensors."""
    weights = dict(network.named_parameters())
    found = {}
    for name, place in places(weights, checkpoint.config).items():
        weight = weights[place.parameter]
        local, start = weight.to_local(), first_row(weight)
        rows = weight.shape[0] if place.rows is None else place.rows
        first, end = max(start, place.first_row), min(start + len(local), place.first_row + rows)
        if first < end:
            target = local[first - start : end - start]
            found[name] = target, (slice(first - place.first_row, end - place.first_row),)
    return found


def _groups(network: Decoder) -> list["FSDPModule"]:
    """Lists the layers and the decoder itself, each of which is gathered in one message."""
    return [module for module in network.modules() if is_spread(module)]
