"""Runs GPU tests without a GPU: `python tests/pretended_gpu.py [arguments of pytest]`.

Without arguments those tests run that end soon. Tensors say that they are on cuda:0 while the CPU does
their work, and Triton interprets its kernels. What a GPU would refuse is refused: operands on two devices,
and, where `torch.cuda.set_sync_debug_mode` watches or a graph is captured, whatever makes the host wait.
A captured graph is the list of its operations, replayed into the same memory. A GPU's memory, time,
streams and rounding are not pretended.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
SOON = (
    "captured or never_waits or launches or repeat or entries or packed_attention or "
    "(norm_rotation and not 300) or (preference_loss and 12-211-8 and bfloat16) or "
    "(forms_of_labels and 12 and bfloat16)"
)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}
state = SimpleNamespace(watched=False, graph=None, copies=0, launches=0, waits=0)


class Pretended(Tensor):
    """A tensor on the CPU, `inner`, that says that it is on a GPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        how = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
            "device": inner.device,
        }
        return Tensor._make_wrapper_subclass(cls, inner.shape, **how)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"Pretended({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return operate(function, args, kwargs or {})


def wrapped(x: object) -> object:
    return Pretended(x) if isinstance(x, Tensor) and not isinstance(x, Pretended) else x


def bare(x: object) -> object:
    return x.inner if isinstance(x, Pretended) else x


def wait(what: object) -> None:
    """Checks that the host may wait, and counts it. Raises: RuntimeError where it must not."""
    state.waits += 1
    if state.watched or state.graph:
        raise RuntimeError(f"the host waits for the GPU in {what}")


class Graph:
    """Keeps what was done while it was captured, which then is undone, and can be done again."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def will_write(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage.data_ptr()] = memory, memory.clone()

    def replay(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()


@contextlib.contextmanager
def capture(graph: Graph):
    state.graph = graph
    try:
        yield
    finally:
        state.graph = None
        for memory, old in graph.before.values():
            memory.copy_(old)


def do(step: Callable[[], object], writes: list[Tensor]) -> object:
    """Does work that only writes what is there already, and notes it where a graph is captured."""
    if state.graph:
        state.graph.will_write(writes)
        state.graph.steps.append(step)
    return step()


def operate(function, args: tuple, kwargs: dict) -> object:
    """Does one operator of torch on pretended tensors and others."""
    space, name = function.name().split("::")
    name = name.split(".")[0]
    if space == "dualign":
        with Devices():
            return custom_ops()[f"{space}::{name}"]._init_fn(*args, **kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    elsewhere = [x for x in tensors if not isinstance(x, Pretended) and x.dim()]
    if elsewhere and name not in ("copy_", "_to_copy"):
        raise RuntimeError(
            f"{function}: operands on two devices, {[(type(x).__name__, tuple(x.shape)) for x in tensors]}"
        )
    masks = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in tensors[1:])
    if name in WAITS or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        wait(function)
    if name in ("index_add", "index_add_") and len(args[2].inner.unique()) < len(args[2].inner):
        raise RuntimeError(f"{function}: a GPU adds rows of one place in an order that differs between runs")
    written = [x for x in written_arguments(function, args, kwargs) if isinstance(x, Pretended)]
    args, kwargs = tree_map(bare, args), tree_map(bare, kwargs)
    if name in ("mm", "addmm") and "dtype" in function._overloadname:
        work = lambda: wide_product(*args, **kwargs)  # noqa: E731
    else:
        work = lambda: function(*args, **kwargs)  # noqa: E731
    if written:
        state.launches += 1
        do(work, [x.inner for x in written])
        if not function._schema.returns:
            return None
        return written[0] if len(written) == 1 else written
    result = work()
    made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
    sources = {
        x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)
    }
    if not all(x.untyped_storage().data_ptr() in sources for x in made):  # a view is no work
        state.launches += "empty" not in name
        if state.graph:

            def again() -> None:
                for old, new in zip(
                    made, (x for x in tree_flatten(work())[0] if isinstance(x, Tensor)), strict=True
                ):
                    old.copy_(new)

            state.graph.steps.append(again)
    return tree_map(wrapped, result)


def wide_product(*operands, out: Tensor | None = None, **kwargs) -> Tensor:
    """Multiplies 16-bit matrices as mm and addmm with float32 output do, which a CPU lacks."""
    a, b = [x for x in operands if isinstance(x, Tensor)][-2:]
    assert (
        a.dtype == b.dtype
        and a.dtype.itemsize == 2
        and torch.float32 in (*operands, kwargs.pop("out_dtype", None))
    )
    product = a.float() @ b.float()
    if isinstance(operands[2], Tensor):
        product = torch.addmm(operands[0].float(), a.float(), b.float(), **kwargs)
    return product if out is None else out.copy_(product)


def written_arguments(function, args: tuple, kwargs: dict) -> list:
    found = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or place >= len(args) else args[place]
            found += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return found


def custom_ops() -> dict[str, CustomOpDef]:
    ours = [module for name, module in sys.modules.items() if name.startswith("kernels")]
    return {
        op._qualname: op for module in ours for op in vars(module).values() if isinstance(op, CustomOpDef)
    }


class Up(torch.autograd.Function):
    """Turns a tensor on the CPU into a pretended one."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return Pretended(x.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx, gradient):
        return bare(gradient).to(ctx.dtype), None


class Down(torch.autograd.Function):
    """Turns a pretended tensor back into one on the CPU."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return x.inner.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx, gradient):
        return Pretended(bare(gradient).to(ctx.dtype, copy=True)), None


class Devices(TorchFunctionMode):
    """Handles what names a device, and what torch would not hand on to `operate`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        ours = bool(args) and isinstance(args[0], Pretended)
        if function is Tensor.__setitem__ and ours:
            return set_items(*args)
        if function in (Tensor.tolist, Tensor.numpy) and ours:
            wait(function)
            return getattr(args[0].inner, function.__name__)()
        if (
            function is Tensor.copy_
            and ours
            and not (torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad))
        ):
            return operate(torch.ops.aten.copy_.default, args, kwargs)
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return moved(function, *args, **kwargs)
        if kwargs.get("device") is None:
            return function(*args, **kwargs)
        there = torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = torch.device("cpu")
        made = function(*args, **kwargs)
        if there and function in (torch.tensor, torch.as_tensor) and not isinstance(made, Pretended):
            wait(function)
        return wrapped(made) if there else made


def moved(
    function, x: Tensor, *rest, non_blocking: bool = False, copy: bool = False, device=None, dtype=None
) -> Tensor:
    """Moves a tensor as Tensor.to, .cpu and .cuda do."""
    device = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(function, device)
    for value in rest:
        if isinstance(value, str | torch.device):
            device = value
        elif isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
    kind = "" if device is None else torch.device(device).type
    if kind == "cuda" and not isinstance(x, Pretended):
        if state.graph or not non_blocking:
            wait("a copy to the GPU")
        return Up.apply(x, dtype or x.dtype)
    if kind == "cpu" and isinstance(x, Pretended):
        if not non_blocking:
            wait("a copy to the CPU")
        state.copies += 1
        return Down.apply(x, dtype or x.dtype)
    return x.to(dtype or x.dtype, copy=copy)


def set_items(target: Pretended, index, value) -> None:
    items = index if isinstance(index, tuple) else (index,)
    given = [x for x in (*items, value) if isinstance(x, Tensor)]
    if any(not isinstance(x, Pretended) and x.dim() for x in given) or any(
        isinstance(x, Tensor) and x.dtype == torch.bool for x in items
    ):
        wait("an assignment to what a mask or a tensor on the CPU names")
    inner, place, value = target.inner, tuple(bare(x) for x in items), bare(value)
    with torch._C.DisableTorchFunction():
        state.launches += 1
        do(lambda: inner.__setitem__(place, value), [inner])


class Launch:
    """A kernel of Triton's that is launched in the interpreter."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid) -> Callable[..., None]:
        def launch(*args, **kwargs) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            assert all(isinstance(x, Pretended) for x in given), "a pointer to the CPU's memory"
            if "UPCAST" in kwargs:
                kwargs["UPCAST"] = True
            args, kwargs = [bare(x) for x in args], {name: bare(x) for name, x in kwargs.items()}
            state.launches += 1
            do(lambda: self.kernel[grid](*args, **kwargs), [x.inner for x in given])

        return launch


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
) -> Tensor:
    """Attends as torch 2.11's varlen_attn does, run by run."""
    from tests.helpers.attention import by_runs

    assert (
        query.dtype.itemsize == 2
        and all(x.stride(-1) == 1 for x in (query, key, value))
        and window_size[1] == 0
    )
    runs = [x.inner for x in (cu_seq_q, cu_seq_k)]
    assert [x.dtype for x in runs] == 2 * [torch.int32] and [int(x.diff().max()) for x in runs] == [
        max_q,
        max_k,
    ]
    window = None if window_size[0] == -1 else window_size[0] + 1
    inputs = [Down.apply(x, torch.float32) for x in (query, key, value)]
    return Up.apply(by_runs(*inputs, *(x.tolist() for x in runs), scale, None, window), query.dtype)


class Generator(torch.Generator):
    """A generator that is on the CPU wherever it is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Profile:
    """A profile of copies to the host alone."""

    def __init__(self, **options) -> None:
        pass

    def __enter__(self) -> "Profile":
        state.copies = 0
        return self

    def __exit__(self, *error) -> None:
        pass

    def events(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(name="kernel"),
            *(SimpleNamespace(name="Memcpy DtoH") for _ in range(state.copies)),
        ]


class Event:
    """A moment of the host's, as nothing is computed behind its back."""

    def __init__(self, **options) -> None:
        pass

    def record(self) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.moment - self.moment)


def pretend() -> None:
    """Makes this process believe that it has a GPU from now on."""
    import torch.nn.attention.varlen as varlen

    from kernels import gather_triton
    from kernels.attention import decode_triton
    from kernels.layer import layer_gradients, layer_triton
    from kernels.loss_head import forward_triton, lists_triton, rows_triton
    from kernels.sampling import draw_triton, record_triton

    for module in (
        decode_triton,
        gather_triton,
        draw_triton,
        forward_triton,
        layer_gradients,
        layer_triton,
        lists_triton,
        record_triton,
        rows_triton,
    ):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Launch(getattr(module, name)))
    nothing = contextlib.nullcontext
    for name, value in {
        "is_available": lambda: True,
        "device_of": lambda x: nothing(),
        "stream": lambda stream: nothing(),
        "Stream": lambda: None,
        "synchronize": lambda *device: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *device: (2**33, 2**33),
        "set_sync_debug_mode": lambda mode: setattr(state, "watched", mode == "error"),
        "CUDAGraph": Graph,
        "graph": capture,
        "is_current_stream_capturing": lambda: state.graph is not None,
        "launches": lambda: state.launches,
        "waits": lambda: state.waits,
        "get_device_properties": lambda *device: SimpleNamespace(total_memory=2**35),
        "get_device_name": lambda *device: "no GPU",
        "Event": Event,
        "memory_allocated": lambda *device: 0,
        "max_memory_allocated": lambda *device: 2**20,
        "reset_peak_memory_stats": lambda *device: None,
    }.items():
        setattr(torch.cuda, name, value)
    torch.Generator, torch.profiler.profile, varlen.varlen_attn = Generator, Profile, varlen_attn
    Devices().__enter__()


def main(arguments: list[str]) -> int:
    """Returns pytest's exit code."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here.parent), str(here)]
    torch.set_num_threads(1)
    pretend()
    import test_gpu  # which asks whether there is a GPU

    test_gpu.SAMPLING |= {"n": 2, "max_new_tokens": 14}  # the interpreter is slow
    test_gpu.STEPS = 1
    chosen = arguments or ["-k", SOON]
    return pytest.main(
        [
            "-o",
            "addopts=",
            "-q",
            "-p",
            "no:cacheprovider",
            "--durations=5",
            *chosen,
            str(here / "test_gpu.py"),
            str(here / "test_gpu_entries.py"),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
