"""Checks of arguments that all public ops share: every ValueError names the argument,
its value and what is accepted.

Shapes, dtypes and devices are always checked. Values of tensors are read on the CPU, and on a GPU only with
`debug=True`, because reading them makes the host wait for the device.
"""

import math
from numbers import Integral, Real

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...] | None,
) -> None:
    """Raises ValueError unless `value` is a tensor of this shape, one of these
    dtypes and one of these devices.

    None in place of a length or of the devices accepts any.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} = {value!r}: expected a tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}: expected a dense tensor, see Tensor.to_dense")
    lengths = zip(shape, value.shape, strict=False)
    if value.dim() != len(shape) or any(n is not None and n != m for n, m in lengths):
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(f"{name} has shape {list(value.shape)}: expected {wanted}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {_names((value.dtype,))}: expected {_names(dtypes)}")
    if devices is not None and value.device not in devices:
        places = " or ".join(sorted({str(device) for device in devices}))
        raise ValueError(f"{name} is on {value.device}: expected {places}")


def check_positive(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number above 0")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least` and at most `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        accepted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} = {value!r}: expected a whole number {accepted}")


def check_values(name: str, value: torch.Tensor, good: torch.Tensor, accepted: str) -> None:
    """Raises ValueError naming the first element of `value` where `good` is false."""
    if not bool(good.all()):
        index = (~good).nonzero()[0].tolist()
        raise ValueError(f"{name}{index} = {value[tuple(index)].item()}: expected {accepted}")


def readable(value: torch.Tensor, debug: bool) -> bool:
    """Returns whether the host may read the values of this tensor."""
    return debug or value.device.type == "cpu"


def check_finite(name: str, value: torch.Tensor, debug: bool) -> None:
    """Raises ValueError where `value` may be read and holds NaN or an infinity."""
    if readable(value, debug):
        check_values(name, value, value.isfinite(), "a finite number")
