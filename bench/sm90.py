"""Compiles every Triton kernel that a table can choose for an H100 (sm_90), without a GPU, and checks the
result: `python -m bench.sm90`.

Prints a table of registers, stack, shared memory and wgmma instructions, and exits 1 where a gate fails.
Spills depend on the compiler: the gates hold for triton 3.6.0, whose stack column must be 0;
another version only reports it.
"""

import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import gather_triton
from kernels.attention import decode_triton
from kernels.layer import layer_gradients, layer_triton
from kernels.loss_head import forward_triton, lists_triton, rows_triton
from kernels.sampling import draw_triton, record_triton

GATED = "3.6.0"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_LIMIT = 232448
# Pointers to numbers of the kernel's dtype; other pointers are to float32.
INPUTS = {
    "p_hidden", "p_weight", "p_bias", "p_jacobian", "p_query", "p_keys", "p_values", "p_key", "p_value",
    "p_d_total", "p_d_out", "p_d_x", "p_d_gate_up", "p_out", "p_raw", "p_rows", "p_x", "p_delta", "p_total",
    "p_qkv", "p_query_norm", "p_key_norm", "p_cos", "p_sin", "p_gate_up", "p_source", "p_sums",
}  # fmt: skip
INT64 = (
    "p_target", "p_length", "p_offsets", "p_order", "p_ends", "p_used", "p_token", "p_stream",
    "p_place", "p_last", "p_step", "p_seed", "p_tokens", "p_row", "p_stop",
)  # fmt: skip
INT32 = ("p_column", "p_count", "p_packed_column", "p_packed_row", "p_index")
FLAGS = ("p_near_tie", "p_finished", "p_fed", "p_alive")
TYPES = dict.fromkeys(INT64, "*i64") | dict.fromkeys(INT32, "*i32") | dict.fromkeys(FLAGS, "*u8")
TYPES |= {"p_kept": "*fp64"}
# Whole numbers that are multiples of 16 in common models.
STRIDES = {
    "vocabulary", "width", "logits_stride", "jacobian_stride", "hidden_stride", "weight_stride", "row_stride",
    "x_stride", "delta_stride", "qkv_stride", "gate_stride", "source_stride", "sums_stride", "space",
}  # fmt: skip
# Whole numbers that can be any.
COUNTS = {"rows", "tiles_per_part", "prompts", "longest", "room", "window", "parts", "heads"}


@dataclass(frozen=True)
class Kernel:
    """One kernel in one configuration."""

    name: str
    function: object
    dtype: str  # of inputs and gradients
    constants: dict[str, int | bool]
    warps: int
    stages: int = 3
    wgmma: bool = False  # whether it must use the tensor cores' warp-group products


def kernels() -> list[Kernel]:
    """Lists every configuration that the tables and rules can choose."""
    return loss_kernels() + decode_kernels() + sampling_kernels() + layer_kernels() + gather_kernels()


def loss_kernels() -> list[Kernel]:
    """Lists the kernels of log-probs and losses."""
    listed, switches = [], list(itertools.product((False, True), repeat=2))
    for dtype, (bias, softcap), jacobian in itertools.product(DTYPES, switches, (True, False)):
        # A short vocabulary is one block, of fewer warps.
        blocks = ((rows_triton.TritonRows.most_columns(softcap), 8), (1024, 4))
        for block, warps in blocks[: 2 if dtype == "bf16" else 1]:
            constants = {
                "HAS_BIAS": bias,
                "HAS_SOFTCAP": softcap,
                "JACOBIAN": jacobian,
                "ONE_PASS": dtype == "bf16",
                "BLOCK_V": block,
            }
            name = f"rows of {block}{'' if jacobian else ', values'}{_switched(bias, softcap)}"
            listed.append(Kernel(name, rows_triton.row_kernel, dtype, constants, warps))
    for _, blocks in forward_triton.TABLE:
        for dtype, (bias, softcap) in itertools.product(("bf16", "fp16"), switches):
            constants = {
                "HAS_BIAS": bias,
                "HAS_SOFTCAP": softcap,
                "UPCAST": False,
                "BLOCK_M": blocks.m,
                "BLOCK_V": blocks.v,
                "BLOCK_D": blocks.d,
            }
            name = f"no stored logits {blocks.m}x{blocks.v}x{blocks.d}{_switched(bias, softcap)}"
            part = forward_triton.part_kernel
            listed.append(Kernel(name, part, dtype, constants, blocks.warps, blocks.stages, wgmma=True))
    for bias, softcap in switches:
        shape = lists_triton.shape_of(49152)
        constants = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "LANES": shape.lanes, "EACH": shape.each}
        constants["BLOCK"] = lists_triton.BLOCK
        for dtype in DTYPES if bias else ("bf16",):  # that of the bias
            select = lists_triton.select_kernel
            name = f"lists of {shape.lanes * shape.each}{_switched(bias, softcap)}"
            listed.append(Kernel(name, select, dtype, constants, shape.warps))
    packed = {"BLOCK": lists_triton.BLOCK}
    listed.append(Kernel("lists, packed", lists_triton.pack_kernel, "fp32", packed, 4))
    for dtype, add in itertools.product(DTYPES, (False, True)):
        constants = {"ADD": add, "BLOCK_N": lists_triton.BLOCK_N, "BLOCK_D": lists_triton.MOST_D}
        name = "lists, gathered" + ", added" * add
        listed.append(Kernel(name, lists_triton.gather_kernel, dtype, constants, 4))
    join = {"BLOCK": 256}
    # A count of 1 reaches a kernel as a constant.
    for name, constants in (("join parts", join), ("join parts, one row", join | {"rows": 1})):
        listed.append(Kernel(name, forward_triton.join_kernel, "fp32", constants, 4))
    return listed


def _switched(bias: bool, softcap: bool) -> str:
    return ", bias" * bias + ", softcap" * softcap


def decode_kernels() -> list[Kernel]:
    """Lists the kernels of decode attention: every tile of the rules, with 4 query heads a key
    head and up to 256 prompts.

    Heads have 64, 128 and 256 numbers. Products of 16 queries are mma.sync,
    and in float32 they use no tensor core.
    """
    listed = []
    for dtype, width, extra in itertools.product(DTYPES, (64, 128, 256), (False, True)):
        flags = {
            "HAS_SOFTCAP": extra,
            "HAS_WINDOW": extra,
            "UPCAST": False,
            "GROUP": 4,
            "WIDTH": width,
            "BLOCK_D": width,
        }
        suffix = ", softcap, window" if extra else ""
        chosen = {decode_triton.prompt_tiles(width, DTYPES[dtype], queries) for queries in (16, 17)}
        for tiles in sorted(chosen):
            constants = flags | {"BLOCK_P": 256, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.tokens}
            name = f"decode, prompts {tiles.queries}x{tiles.tokens}x{width}{suffix}"
            wgmma = tiles.queries >= 64
            prompt = decode_triton.prompt_kernel
            listed.append(Kernel(name, prompt, dtype, constants, tiles.warps, tiles.stages, wgmma))
        tiles = decode_triton.own_tiles(width, DTYPES[dtype], 4)
        constants = flags | {"BLOCK_M": tiles.queries, "BLOCK_N": tiles.tokens}
        name = f"decode, own {tiles.queries}x{tiles.tokens}x{width}{suffix}"
        listed.append(Kernel(name, decode_triton.own_kernel, dtype, constants, tiles.warps, tiles.stages))
    store = {"WIDTH": 128, "BLOCK": 1024}
    listed += [Kernel("decode, store", decode_triton.store_kernel, dtype, store, 4) for dtype in DTYPES]
    return listed + [_single(k) for k in listed if k.dtype == "bf16" and k.constants["WIDTH"] == 64]


def sampling_kernels() -> list[Kernel]:
    """Lists the kernels of sampling from real vocabularies, of up to 64 parts: plain, greedy,
    and with top-k, top-p or both."""
    listed = []
    for dtype in DTYPES:
        for greedy, truncated in ((False, False), (True, False), (False, True)):
            constants = {"BLOCK": draw_triton.PART, "GREEDY": greedy, "TRUNCATED": truncated}
            name = "sampling, parts" + ", greedy" * greedy + ", truncated" * truncated
            listed.append(Kernel(name, draw_triton.part_kernel, dtype, constants, 8))
        for greedy, truncated in ((False, False), (True, False), (False, True)):
            constants = {"BLOCK_PARTS": 64, "GREEDY": greedy, "TRUNCATED": truncated}
            name = "sampling, join" + ", greedy" * greedy + ", truncated" * truncated
            listed.append(Kernel(name, draw_triton.join_kernel, dtype, constants, 1))
        for top_k, top_p in ((50, 1.0), (0, 0.9), (50, 0.9)):
            constants = {"TOP_K": top_k, "TOP_P": top_p, "BLOCK": draw_triton.ROW_BLOCK}
            name = "sampling, keep" + f", top-k {top_k}" * (top_k > 0) + f", top-p {top_p}" * (top_p < 1)
            keep, warps = draw_triton.keep_kernel, draw_triton.ROW_WARPS
            listed.append(Kernel(name, keep, dtype, constants, warps))
    listed.append(Kernel("sampling, streams", draw_triton.stream_kernel, "bf16", {"BLOCK": 256}, 4))
    for feed_last in (False, True):
        constants = {"STOPS": 2, "FEED_LAST": feed_last, "BLOCK": 128}
        name = "sampling, record" + ", the last fed" * feed_last
        listed.append(Kernel(name, record_triton.record_kernel, "bf16", constants, 4))
    return listed + [_single(k) for k in listed if k.dtype == "bf16" and "parts" in k.function.arg_names]


def layer_kernels() -> list[Kernel]:
    """Lists the kernels between a layer's products: states of 576, 4096 and 8192 numbers,
    12 heads of 64 and 40 heads of 128."""
    listed = []
    for dtype in DTYPES:
        for width, add, one_more in itertools.product((576, 4096, 8192), (False, True), (False, True)):
            block = triton.next_power_of_2(width)
            constants = {"ADD": add, "ONE_MORE": one_more, "BLOCK": block}
            warps = layer_triton.norm_warps(block)
            name = f"norm of {width}" + ", added" * add + ", 1 + weight" * one_more
            listed.append(Kernel(name, layer_triton.norm_kernel, dtype, constants, warps))
            for weight in (False, True):
                back = layer_gradients.norm_backward_kernel
                named = name + ", backward" + ", weights too" * weight
                listed.append(Kernel(named, back, dtype, constants | {"WEIGHT": weight}, warps))
        for heads, kv_heads, d in ((9, 3, 64), (32, 8, 128)):
            constants = {
                "HEADS": heads,
                "KV_HEADS": kv_heads,
                "HALF": d // 2,
                "BLOCK_H": triton.next_power_of_2(heads + kv_heads),
                "BLOCK_D": d // 2,
                "BLOCK_V": triton.next_power_of_2(kv_heads * d),
            }
            name = f"rotate {heads} + {kv_heads} of {d}"
            kinds = (False, False), (True, False), (True, True)
            for (normed, one_more), stores in itertools.product(kinds, (False, True)):
                switches = {"NORMED": normed, "ONE_MORE": one_more, "STORES": stores}
                named = name + ", normed" * normed + ", 1 + weight" * one_more + ", stored" * stores
                turn = layer_triton.rotate_kernel
                listed.append(Kernel(named, turn, dtype, constants | switches, 4))
            back = layer_gradients.rotate_backward_kernel
            listed.append(Kernel(name + ", backward", back, dtype, constants, 4))
        for by_gelu in (False, True):
            constants = {"GELU": by_gelu, "BLOCK": layer_triton.GATE_BLOCK}
            name = "gate by gelu" if by_gelu else "gate"
            listed.append(Kernel(name, layer_triton.gate_kernel, dtype, constants, 4))
            back = layer_gradients.gate_backward_kernel
            listed.append(Kernel(name + ", backward", back, dtype, constants, 4))
    return listed


def gather_kernels() -> list[Kernel]:
    """Lists the kernel that adds up the gradients of rows that were taken by index."""
    constants = {"BLOCK": gather_triton.BLOCK}
    return [Kernel("sums of places", gather_triton.places_kernel, dtype, constants, 4) for dtype in DTYPES]


def _single(kernel: Kernel) -> Kernel:
    """Returns the kernel with one row of one prompt in one part, counts that reach a kernel as constants."""
    ones = {name: 1 for name in kernel.function.arg_names if name in ("rows", "prompts", "parts")}
    return replace(kernel, name=kernel.name + ", one row", constants=kernel.constants | ones)


def compiled(kernel: Kernel) -> dict[str, int]:
    """Compiles a kernel; returns registers a thread, stack bytes (spills),
    shared bytes and wgmma instructions."""
    names = kernel.function.arg_names
    signature = {name: _type(kernel, name) for name in names}
    aligned = [i for i, name in enumerate(names) if name.startswith("p_") or name in STRIDES]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":", 1) for part in dump.split() if ":" in part)
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
    }


def _type(kernel: Kernel, name: str) -> str:
    """Returns the type of a kernel's argument, in Triton's words."""
    if name in kernel.constants:
        return "constexpr"
    if name in INPUTS:
        return f"*{kernel.dtype}"
    if name in TYPES:
        return TYPES[name]
    if name.startswith("p_"):
        return "*fp32"
    return "i32" if name in STRIDES | COUNTS else "fp32"


def failures(kernel: Kernel, figures: dict[str, int]) -> list[str]:
    """Lists the gates that a compiled kernel fails."""
    failed = []
    if figures["registers"] > 255:
        failed.append(f"{figures['registers']} registers")
    if figures["stack"] and triton.__version__ == GATED:
        failed.append(f"{figures['stack']} bytes of stack")
    if figures["shared"] > SHARED_LIMIT:
        failed.append(f"{figures['shared']} bytes of shared memory")
    if kernel.wgmma and not figures["wgmma"]:
        failed.append("no wgmma")
    return failed


def main() -> int:
    """Runs the command; returns the exit code."""
    gate = "all gates" if triton.__version__ == GATED else f"the stack gate needs triton {GATED}"
    header = ["kernel", "dtype", "warps", "stages", "registers", "stack", "shared", "wgmma", ""]
    table = Table(*header, title=f"sm_90, triton {triton.__version__} ({gate})")
    bad = 0
    for kernel in kernels():
        figures = compiled(kernel)
        failed = failures(kernel, figures)
        bad += bool(failed)
        settings = [kernel.name, kernel.dtype, str(kernel.warps), str(kernel.stages)]
        table.add_row(*settings, *map(str, figures.values()), "; ".join(failed))
    Console().print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
