"""Inputs of decode attention, and how exact it must be."""

import torch

from kernels import reference


def problem(
    groups=(2, 0, 3),
    length=(20, 9, 5),
    heads=4,
    kv_heads=2,
    width=16,
    room=8,
    used=5,
    dtype=torch.float32,
    device="cpu",
) -> dict:
    """Returns the inputs of decode attention: rows of ragged prompts, with NaN
    where nothing is stored yet."""
    rows, prompts, generator = sum(groups), len(groups), torch.Generator().manual_seed(0)
    shapes = {
        "query": (rows, heads, width),
        "prompt_keys": (prompts, kv_heads, max(length), width),
        "prompt_values": (prompts, kv_heads, max(length), width),
        "own_keys": (rows, kv_heads, room, width),
        "own_values": (rows, kv_heads, room, width),
    }
    data = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("keys", "values"):
        for p, n in enumerate(length):
            data[f"prompt_{name}"][p, :, n:] = torch.nan
        data[f"own_{name}"][:, :, used:] = torch.nan
    data = {name: x.to(device, dtype) for name, x in data.items()}
    offsets = torch.tensor([0, *groups]).cumsum(0)
    return data | {
        name: torch.as_tensor(x, device=device)
        for name, x in (("prompt_length", list(length)), ("owner_offsets", offsets), ("used", [used]))
    }


def dense(data: dict, options: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Returns the attention of `kernels.reference` in this dtype, on the CPU."""
    data = {name: x.to("cpu", dtype) if x.is_floating_point() else x.cpu() for name, x in data.items()}
    return reference.decode_attention(**data, **options)


def assert_as_good_as_torch(got: torch.Tensor, data: dict, options: dict, rounding: float = 0.0) -> None:
    """Asserts that the error is at most twice that of plain torch in this dtype, with room for one more
    rounding and for float32's exponentials.

    Errors are relative to the largest output.
    """
    exact, plain = dense(data, options), dense(data, options, data["query"].dtype)
    assert got.dtype == data["query"].dtype and got.shape == exact.shape
    error, bound = (
        (x.double().cpu() - exact).abs().max().item() / exact.abs().max().item() for x in (got, plain)
    )
    slack = torch.finfo(got.dtype).eps + 4 * torch.finfo(torch.float32).eps
    assert error <= 2 * bound + slack + rounding, f"{error} against {bound}"


WINDOWS = [None, 2, 5, 6, 12, 100]

OPTIONS = [{"window": window} for window in WINDOWS] + [
    {"softcap": 0.7, "scale": 0.4},
    {"softcap": 1.5, "window": 12},
]
