"""The machine that a run is on: its free memory, its speed, and how its C library keeps freed memory."""

import ctypes
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

from engine.errors import UserError
from kernels.products import linear


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Returns the bytes free on the GPU, or in main memory as far as the process's
    control groups let it go."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(min(int(line.split()[1]) * 1024, _cgroup_room(root)))
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _cgroup_room(root: Path) -> float:
    """Returns the bytes left under the limits of the process's control group and of those
    above it; inf without a limit.

    Both versions of control groups are read. Cached files that are not in use count as free, as the kernel
    drops them before it refuses memory.
    """
    room, groups = math.inf, root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's; the container's group then stands at the mount.
        for group in (mount / at for at in (inside, *inside.parents)):
            try:
                limit, used = ((group / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                room = min(room, int(limit) - int(used) + int(stat.get(names[2], 0)))
    return max(0, room)


def device_name(device: torch.device) -> str:
    """Names what computes: the make of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_equal_devices(names: Sequence[str]) -> None:
    """Checks that all ranks compute on devices of one name, as others round otherwise. names: by rank.
    Raises: UserError."""
    for rank, name in enumerate(names):
        if name != names[0]:
            raise UserError(
                f"rank {rank} computes on {name} and rank 0 on {names[0]}: one run needs equal devices, as "
                "others round otherwise; choose them with CUDA_VISIBLE_DEVICES, and start as many ranks."
            )


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Times a matrix product as the engine makes it, in multiplications and additions per second: of its
    usual shape on a CPU, and of 8192 on a GPU, where a small one takes no longer than its launch.

    The best of 30 or more products within half a second or more counts: an idle machine starts slowly, and
    one that still reads its libraries from the disk runs a tenth as fast.
    """
    rows, inner, columns = (256, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = torch.ones(columns, inner, dtype=dtype, device=device)
    best, begun, done = math.inf, time.perf_counter(), 0
    while (past := time.perf_counter() - begun) < 0.5 or (done < 30 and past < 5):
        start = time.perf_counter()
        linear(x, weight)[0, 0].item()
        best, done = min(best, time.perf_counter() - start), done + 1
    return 2 * rows * inner * columns / best


def prepare_gpu() -> None:
    """Lets products on a GPU give equal bits for equal inputs, and add in float32 alone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Lets a backward pass on `device` give equal bits for equal inputs.

    On a GPU attention's own backward pass adds with atomics otherwise.
    """
    if device.type != "cuda":
        yield
        return
    prepare_gpu()  # without it torch refuses products here
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory that nobody reads
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def keep_freed_memory() -> None:
    """Lets glibc reuse freed blocks of any size instead of giving them back to the system.

    Fresh pages for every large tensor cost more than the arithmetic on it.
    Where the C library is another one, nothing happens.
    """
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
