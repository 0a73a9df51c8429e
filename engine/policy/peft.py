"""Import and export of adapters in PEFT's file format."""

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError
from engine.files import is_file, one_line, read_json, shown, write_whole
from engine.model.checkpoint import inside
from engine.model.decoder import Decoder
from engine.model.names import LINEARS
from engine.policy.lora import Adapter, Placement, layer_and_name

# These keys of adapter_config.json are read, or leave what an adapter computes as it is. Which linears it has
# is known from its tensors.
KNOWN = {
    "r", "lora_alpha", "peft_type", "bias", "init_lora_weights", "base_model_name_or_path", "revision",
    "task_type", "peft_version", "auto_mapping", "inference_mode", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    # How the first A was found, and how gradients of A were computed.
    "eva_config", "velora_config",
}  # fmt: skip
# Other values of these keys for some linears.
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
# These starts of A and B leave the base weights alone. Others (PiSSA, OLoRA, LoftQ) change them, so that an
# adapter does not fit the model as it was published.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
LARGEST_ALPHA = 1e6
_PREFIX = "base_model.model.model.layers."


def save_peft(adapter: Adapter, folder: Path, base_model: str, dropout: float = 0.0) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as peft reads them, each whole or not at all.

    base_model: folder or id of the base model. dropout: that of the training, which peft goes on with where
    it trains. Raises: UserError on a full or closed disk.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in _by_peft_name(adapter).items()}
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": "layers",
        "layers_to_transform": list(range(adapter.first_layer, adapter.placement.last_layer)),
        "lora_alpha": adapter.alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted({n.split(".")[-1] for n in adapter.placement.linears}),
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        folder / "adapter_model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"})
    )
    write_whole(
        folder / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    )


def load_peft(folder: str | Path, model: Decoder) -> Adapter:
    """Reads the adapter of a PEFT folder for `model`, on any linears of consecutive layers.

    Raises: UserError naming the switch or module that is not supported, or the tensor
    that does not fit the model.
    """
    folder = Path(folder)
    config = read_json(inside(folder, "adapter_config.json"), cure="give a PEFT adapter folder")
    file = inside(folder, "adapter_model.safetensors")
    if not is_file(file) and is_file(folder / "adapter_model.bin"):
        raise UserError(
            f"{shown(folder)}: only adapter_model.bin, a pickle, which is never executed; "
            "use a safetensors adapter."
        )
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{shown(file)}: not a whole safetensors file ({one_line(error)}); fetch it again."
        ) from error
    rank, alpha = _check_config(config, folder / "adapter_config.json")
    placement = Placement.on(model, **_adapted(tensors, file))
    if placement.last_layer > model.config.num_layers:
        raise UserError(
            f"{folder}: this adapter does not fit the model: it adapts layer {placement.last_layer - 1} and "
            f"the model has {model.config.num_layers}; give the model it was trained on."
        )
    name = max(tensors, key=lambda name: max(tensors[name].shape, default=0))
    if rank > max(tensors[name].shape, default=0):
        raise UserError(
            f"{shown(file)}: {name} has shape {tuple(tensors[name].shape)}, adapter_config.json says rank "
            f"{rank}; fetch the folder again."
        )
    adapter = Adapter(placement, rank=rank, alpha=alpha, dtype=model.dtype, device=model.device, seed=0)
    wanted = _by_peft_name(adapter)
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: this adapter does not fit the model: {name} has shape {tuple(value.shape)}, "
                f"not {tuple(wanted[name].shape)}; give the model it was trained on."
            )
        if not value.is_floating_point() or value.element_size() == 1:
            raise UserError(
                f"{folder}: {name} is stored as {value.dtype}; use an adapter that is not quantised."
            )
        if not value.isfinite().all():
            raise UserError(f"{shown(file)}: {name} holds numbers that are not finite; fetch it again.")
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    return adapter


def _by_peft_name(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the parameters of an adapter under the names that they have in PEFT's file."""
    named = {}
    for key in adapter.down:
        layer, name = layer_and_name(key)
        named[f"{_PREFIX}{layer}.{name}.lora_A.weight"] = adapter.down[key]
        named[f"{_PREFIX}{layer}.{name}.lora_B.weight"] = adapter.up[key]
    return named


def _check_config(config: dict, file: Path) -> tuple[int, float]:
    """Returns rank and alpha of an adapter_config.json.

    With use_rslora the scale is alpha / sqrt(rank) (arXiv 2312.03732): the alpha that is returned, divided by
    the rank, gives that scale.

    Raises: UserError naming the key that is not supported.
    """
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(
            f"{file}: only LoRA adapters without biases are supported; peft_type and bias say otherwise."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for key, value in config.items():
        if key in PATTERNS and isinstance(value, dict):
            # Where every entry is the value of all others, nothing differs.
            value = [entry for entry in value.values() if entry != config.get(PATTERNS[key])]
        if value and key not in KNOWN and not (key == "use_rslora" and value is True):
            raise UserError(
                f"{file}: {shown(key)} {shown(str(value)[:60])} is not supported; use a plain LoRA adapter."
            )
    if config.get("init_lora_weights") not in STARTS:
        raise UserError(
            f"{file}: init_lora_weights {shown(str(config['init_lora_weights'])[:60])} changes the base "
            "weights; convert the adapter to plain LoRA with PEFT."
        )
    if type(rank) is not int or rank < 1:
        raise UserError(
            f"{file}: r is {rank!r:.60}; it must be a whole number above 0: fetch the file again."
        )
    if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST_ALPHA:
        raise UserError(
            f"{file}: lora_alpha is {alpha!r:.60}; it must be a number of at most {LARGEST_ALPHA:g}: "
            "fetch the file again."
        )
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _adapted(tensors: dict[str, Tensor], file: Path) -> dict:
    """Finds where an adapter sits from the names of its tensors.

    Returns: first_layer, last_layer and linears of a `Placement`.

    Raises: UserError naming a module that is not supported.
    """
    short = ", ".join(name.split(".")[-1] for name in LINEARS)
    supported = f"adapters on the same of {short} in consecutive layers are"
    modules: dict[
        int, set[str]
    ] = {}  # layer -> its adapted linears, each with .lora_A.weight and .lora_B.weight
    for name in tensors:
        layer, _, module = name.removeprefix(_PREFIX).partition(".")
        linear, _, matrix = module.partition(".lora_")
        in_a_layer = name.startswith(_PREFIX) and layer.isdecimal() and len(layer) < 10
        if not (in_a_layer and linear in LINEARS and matrix in ("A.weight", "B.weight")):
            short_name = name.removeprefix("base_model.model.").removesuffix(".weight")
            raise UserError(f"{file}: an adapter with {shown(short_name)} is not supported; {supported}.")
        modules.setdefault(int(layer), set()).add(module)
    if not modules:
        raise UserError(f"{file}: no tensors in it; fetch it again.")
    first, last = min(modules), max(modules)
    for layer in range(first, last + 1):
        if layer not in modules:
            raise UserError(
                f"{file}: an adapter on layers {first} and {last} without layer {layer} is not "
                f"supported; {supported}."
            )
        uneven = sorted(modules[layer] ^ modules[first])
        if uneven:
            raise UserError(
                f"{file}: {uneven[0]} is not in both of layers {first} and {layer}, which is not "
                f"supported; {supported}."
            )
    halves = [module.partition(".lora_")[0] for module in modules[first]]
    alone = sorted(linear for linear in halves if halves.count(linear) == 1)
    if alone:
        raise UserError(f"{file}: {alone[0]} has only one of lora_A and lora_B; fetch it again.")
    return {"first_layer": first, "last_layer": last + 1, "linears": tuple(n for n in LINEARS if n in halves)}
