"""Low-rank adapters (LoRA, arXiv 2106.09685) on every linear of a range of layers; import and export in PEFT's file format.

An adapter is never merged in place: it is passed to each call of the model, and leaving it out gives the reference.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import UserError
from engine.run.store import write_whole

# Fused matrix -> the Hugging Face linears stacked in it, in order.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# Keys of adapter_config.json that are read, or that leave what an adapter computes as it is; the tensors say which linears it has.
KNOWN = {
    "r", "lora_alpha", "peft_type", "bias", "init_lora_weights", "base_model_name_or_path", "revision", "task_type", "peft_version",
    "auto_mapping", "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
# Starts of A and B that leave the base weights alone; others (PiSSA, OLoRA, LoftQ) change them, and the adapter is not for the model alone.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model.model.layers."


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an adapter needs to know of its model: sizes, and the layers it sits on."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    first_layer: int
    last_layer: int  # exclusive
    linears: tuple[str, ...] = tuple(n for names in PARTS.values() for n in names)  # those of each layer that are adapted

    @staticmethod
    def of(model, first_layer: int, **changes) -> "Shape":
        """That of an adapter on the layers of `model` from `first_layer` on."""
        c = model.config
        sizes = dict(hidden=c.hidden_size, intermediate=c.intermediate_size, heads=c.num_heads, kv_heads=c.num_kv_heads)
        return Shape(**{**sizes, "head_dim": c.head_dim, "first_layer": first_layer, "last_layer": c.num_layers, **changes})

    def linear(self, name: str) -> tuple[int, int]:
        """(out, in) features of a Hugging Face linear."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }[name]


class PolicyWeights(nn.Module):
    """What is trained of a policy."""

    def tensors(self) -> dict[str, Tensor]:
        """Detached copies of all parameters, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` of an equal module returned."""
        for name, value in self.named_parameters():
            value.copy_(tensors[name])


class Adapter(PolicyWeights):
    """A and B of every adapted linear, float32 unless the model is float64; output += (alpha / rank) B A x."""

    def __init__(self, shape: Shape, *, rank: int, alpha: float, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        super().__init__()
        self.shape, self.rank, self.alpha = shape, rank, alpha
        self.compute_dtype = dtype
        master = torch.float64 if dtype == torch.float64 else torch.float32
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer in range(shape.first_layer, shape.last_layer):
            for number, name in enumerate(n for names in PARTS.values() for n in names):
                if name not in shape.linears:
                    continue
                out, inside = shape.linear(name)
                generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 101 + number)
                start = (torch.rand(rank, inside, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(inside)
                self.down[_key(layer, name)] = nn.Parameter(start.to(device, master))
                self.up[_key(layer, name)] = nn.Parameter(torch.zeros(out, rank, dtype=master, device=device))

    @staticmethod
    def on(model, *, rank: int, alpha: float, share: float, seed: int) -> "Adapter":
        """A fresh adapter (B = 0) on the layers of `model` from `share` of its depth on."""
        shape = Shape.of(model, first_layer(model.config.num_layers, share))
        return Adapter(shape, rank=rank, alpha=alpha, dtype=model.dtype, device=model.device, seed=seed)

    @property
    def first_layer(self) -> int:
        """The first adapted layer; everything below it equals the reference."""
        return self.shape.first_layer

    def fused(self, start: int, stop: int) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
        """Layer -> fused matrix -> (A [parts * rank, in], scaled block-diagonal B [out, parts * rank]) for layers start..stop-1."""
        scale, result = self.alpha / self.rank, {}
        for layer in range(max(start, self.shape.first_layer), min(stop, self.shape.last_layer)):
            result[layer] = {}
            for matrix, names in PARTS.items():
                adapted = [n for n in names if n in self.shape.linears]
                if not adapted:
                    continue
                down = torch.cat([self.down[_key(layer, n)] for n in adapted])
                # A linear that is not adapted is a block without columns.
                up = torch.block_diag(*(
                    self.up[_key(layer, n)] if n in adapted else down.new_zeros(self.shape.linear(n)[0], 0) for n in names
                )) * scale  # fmt: skip
                result[layer][matrix] = (down.to(self.compute_dtype), up.to(self.compute_dtype))
        return result

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Hugging Face weight name -> (alpha / rank) B A, for merging."""
        scale, result = self.alpha / self.rank, {}
        for key in self.down:
            layer, name = _unkey(key)
            result[f"model.layers.{layer}.{name}.weight"] = scale * self.up[key] @ self.down[key]
        return result


def first_layer(num_layers: int, share: float) -> int:
    """The first adapted layer of an adapter on the layers from `share` of the depth on."""
    return int(num_layers * share)


def save_peft(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft reads them, each whole or not at all.

    base_model: folder or id of the base model. Raises: UserError on a full or closed disk.
    """
    tensors = {}
    for key in adapter.down:
        layer, name = _unkey(key)
        tensors[f"{_PREFIX}{layer}.{name}.lora_A.weight"] = adapter.down[key].detach().cpu().contiguous()
        tensors[f"{_PREFIX}{layer}.{name}.lora_B.weight"] = adapter.up[key].detach().cpu().contiguous()
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": "layers",
        "layers_to_transform": list(range(adapter.shape.first_layer, adapter.shape.last_layer)),
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted({n.split(".")[-1] for n in adapter.shape.linears}),
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(folder / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def load_peft(folder: str | Path, model) -> Adapter:
    """The adapter of a PEFT folder for `model`, on any linears of consecutive layers.

    Raises: UserError naming the switch or module that is not supported, or the tensor that does not fit the model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: not a PEFT adapter folder ({error}).") from error
    file = folder / "adapter_model.safetensors"
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}: only adapter_model.bin, a pickle, which is never executed; use a safetensors adapter.")
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch it again.") from error
    rank, alpha = _check_config(config, folder / "adapter_config.json")
    shape = Shape.of(model, **_adapted(tensors, file))
    if shape.last_layer > model.config.num_layers:
        raise UserError(
            f"{folder}: this adapter does not fit the model: it adapts layer {shape.last_layer - 1} and the model has "
            f"{model.config.num_layers}; give the model it was trained on."
        )
    adapter = Adapter(shape, rank=rank, alpha=alpha, dtype=model.dtype, device=model.device, seed=0)
    wanted = {}
    for key in adapter.down:
        layer, name = _unkey(key)
        wanted[f"{_PREFIX}{layer}.{name}.lora_A.weight"] = adapter.down[key]
        wanted[f"{_PREFIX}{layer}.{name}.lora_B.weight"] = adapter.up[key]
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: this adapter does not fit the model: {name} has shape {tuple(value.shape)}, not {tuple(wanted[name].shape)}; "
                "give the model it was trained on."
            )
        if not value.is_floating_point() or value.element_size() == 1:
            raise UserError(f"{folder}: {name} is stored as {value.dtype}; use an adapter that is not quantised.")
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    return adapter


def _check_config(config: object, file: Path) -> tuple[int, float]:
    """Rank and alpha of an adapter_config.json. Raises: UserError naming the key that is not supported."""
    if not isinstance(config, dict):
        raise UserError(f"{file}: a JSON {type(config).__name__}, not an object; fetch the file again.")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"{file}: only LoRA adapters without biases are supported; peft_type and bias say otherwise.")
    for key, value in config.items():
        if value and key not in KNOWN:
            raise UserError(f"{file}: {key} {str(value)[:60]} is not supported; use a plain LoRA adapter.")
    if config.get("init_lora_weights") not in STARTS:
        raise UserError(
            f"{file}: init_lora_weights {config['init_lora_weights']} changes the base weights; "
            "convert the adapter to plain LoRA with PEFT."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{file}: r is {rank!r:.60}; it must be a whole number above 0: fetch the file again.")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f"{file}: lora_alpha is {alpha!r:.60}; it must be a number: fetch the file again.")
    return rank, alpha


def _adapted(tensors: dict[str, Tensor], file: Path) -> dict:
    """first_layer, last_layer and linears of the `Shape` that an adapter's tensors have. Raises: UserError naming another module."""
    supported = f"adapters on the same of {', '.join(n.split('.')[-1] for n in Shape.linears)} in consecutive layers are"
    linears: dict[int, set[str]] = {}
    for name in tensors:
        layer, _, module = name.removeprefix(_PREFIX).partition(".")
        linear, _, matrix = module.partition(".lora_")
        if not (name.startswith(_PREFIX) and layer.isdecimal() and linear in Shape.linears and matrix in ("A.weight", "B.weight")):
            shown = name.removeprefix("base_model.model.").removesuffix(".weight")
            raise UserError(f"{file}: an adapter with {shown} is not supported; {supported}.")
        linears.setdefault(int(layer), set()).add(module)
    if not linears:
        raise UserError(f"{file}: no tensors in it; fetch it again.")
    first, last = min(linears), max(linears)
    for layer in range(first, last + 1):
        if layer not in linears:
            raise UserError(f"{file}: an adapter on layers {first} and {last} without layer {layer} is not supported; {supported}.")
        uneven = sorted(linears[layer] ^ linears[first])
        if uneven:
            raise UserError(f"{file}: {uneven[0]} is not in both of layers {first} and {layer}, which is not supported; {supported}.")
    adapted = {module.partition(".lora_")[0] for module in linears[first]}
    alone = sorted(linear for linear in adapted if len([m for m in linears[first] if m.startswith(f"{linear}.lora_")]) == 1)
    if alone:
        raise UserError(f"{file}: {alone[0]} has only one of lora_A and lora_B; fetch it again.")
    return {"first_layer": first, "last_layer": last + 1, "linears": tuple(n for n in Shape.linears if n in adapted)}


def _key(layer: int, name: str) -> str:
    return f"{layer}|{name.replace('.', '|')}"


def _unkey(key: str) -> tuple[int, str]:
    layer, *name = key.split("|")
    return int(layer), ".".join(name)
