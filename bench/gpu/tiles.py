"""Sweeps of the configurations that kernels could take: the row kernel, log-probs without
gradients, decode attention."""

import itertools

import torch

from bench.gpu.kernels import CACHE, Cache, Heads, decode_problem
from bench.gpu.steps import BF16, copy_rate, per_call, table
from kernels.attention import decode_triton
from kernels.attention.records import Caches, Score
from kernels.loss_head import forward_triton, rows_triton
from kernels.loss_head.records import Head

# (width, vocabulary) of the loss heads that are tried.
LOSS_HEADS = ((576, 49152), (896, 151936), (1024, 151936), (1536, 151936), (2048, 128256), (4096, 128256))
# (logits at a time, warps) of the row kernel.
ROW_TILES = tuple(
    (block, warps)
    for block, warps in itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16, 32))
    if 64 <= block // warps <= 1024
)
FORWARD_TILES = (
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (64, 256, 64, 4, 3),
    (128, 128, 32, 8, 4),
)
SHARED_TILES = (16, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2), (64, 128, 8, 2)
OWN_TILES = (16, 64, 4, 3), (16, 32, 4, 4), (16, 128, 4, 3), (16, 64, 2, 4)


def row_tiles(
    device: torch.device,
    rows: int = 8192,
    vocabulary: int = 151936,
    tiles: tuple[tuple[int, int], ...] = ROW_TILES,
) -> list[dict]:
    """Measures the row kernel on float32 logits, J in bfloat16, in several blocks and warps."""
    logits = torch.randn(rows, vocabulary, device=device)
    jacobian = torch.empty(rows, vocabulary, dtype=BF16, device=device)
    target = torch.randint(vocabulary, (rows,), device=device)
    logprob, scale = torch.empty(2, rows, device=device)
    moved, copied, measured = 6 * rows * vocabulary, copy_rate(device), []
    for block, warps in tiles:

        def call(i: int, block: int = block, warps: int = warps) -> None:
            rows_triton.row_kernel[(rows,)](
                logits,
                jacobian,
                logits,
                target,
                logprob,
                scale,
                vocabulary,
                vocabulary,
                vocabulary,
                *rows_triton.factors(1.0, None),
                HAS_BIAS=False,
                HAS_SOFTCAP=False,
                JACOBIAN=True,
                ONE_PASS=True,
                BLOCK_V=block,
                num_warps=warps,
            )

        s = per_call(call, 2, device)
        chosen = block == rows_triton.TritonRows.most_columns(capped=False) and warps == 8
        measured.append(
            [block, warps, 1000 * s, moved / s / 1e9, 100 * moved / s / copied, "chosen" * chosen]
        )
    title = f"Row kernel, {rows} x {vocabulary}: one read of float32 logits, one write of bfloat16"
    return [table(title, ["block", "warps", "ms", "GB/s", "% of a copy", ""], measured, device=device)]


def forward_tiles(
    device: torch.device, rows: int = 8192, heads: tuple[tuple[int, int], ...] = LOSS_HEADS
) -> list[dict]:
    """Measures log-probs without gradients: the kernel that stores no logits, in several tiles, against
    cuBLAS's logits and the row kernel."""
    stored, measured = "stored logits, row kernel", []
    for width, vocabulary in heads:
        shapes = ((rows, width), (vocabulary, width))
        hidden, weight = (torch.randn(*shape, device=device).to(BF16) / width**0.25 for shape in shapes)
        target = torch.randint(vocabulary, (rows,), device=device)
        out = torch.empty(rows, device=device)
        logits = torch.empty(rows, vocabulary, dtype=BF16, device=device)
        bare = per_call(lambda i, h=hidden, w=weight, z=logits: torch.mm(h, w.t(), out=z), 3, device)
        del logits
        head = Head(weight, bias=None, temperature=1.0, softcap=None)
        sizes = rows_triton.TritonRows.sizes(head, rows, 1 << 62, "kept")
        work = rows_triton.TritonRows(head, sizes, rows, "kept")
        ways = {stored: lambda i, w=work, h=hidden, y=target: w._logprob(h, y, w.logits, False)}
        for tile in FORWARD_TILES:
            blocks = forward_triton.Blocks(*tile)
            cut = blocks, forward_triton.parts_for(rows, blocks, vocabulary)
            ways[_without(tile)] = lambda i, cut=cut, h=hidden, head=head, y=target, o=out: (
                forward_triton.token_logprob(h, head, y, *cut, o)
            )
        chosen = forward_triton.blocks_for(width, BF16)
        chosen = stored if chosen is None else _without(chosen)
        for name, way in ways.items():
            s = per_call(way, 3, device)
            share = 100 * bare / s
            measured.append([f"{width} x {vocabulary}", name, 1000 * s, share, "chosen" * (name == chosen)])
        del hidden, weight, head, work, ways
    title = f"Log-probs of {rows} rows without gradients, bfloat16"
    return [table(title, ["head", "", "ms", "% of the bare product", ""], measured, device=device)]


def _without(tile: tuple[int, ...]) -> str:
    return "no stored logits, " + "x".join(map(str, tile))


def decode_tiles(device: torch.device, cache: Cache = CACHE) -> list[dict]:
    """Measures decode attention at Qwen2.5-1.5B's shape, in several tiles of both
    passes and parts of a prompt."""
    heads, used = Heads(12, 2, 128), cache.room // 2
    data = [decode_problem(cache, heads, used, device) for _ in range(cache.layers)]
    queries = [problem.pop("query") for problem in data]
    caches = [Caches(**problem) for problem in data]
    group = heads.query // heads.key
    chosen = (
        decode_triton.prompt_tiles(heads.width, BF16, cache.n * group),
        decode_triton.own_tiles(heads.width, BF16, group),
    )
    score, measured = Score(heads.width**-0.5, softcap=None, window=None), []
    for shared, own, parts in itertools.product(SHARED_TILES, OWN_TILES, (1, 2, 4)):
        plan = decode_triton.Plan(decode_triton.Tiles(*shared), decode_triton.Tiles(*own), parts)
        s = per_call(
            lambda i, plan=plan: decode_triton.decode_attention(queries[i], caches[i], score, plan),
            cache.layers,
            device,
        )
        names = ["x".join(map(str, tile)) for tile in (shared, own)]
        measured.append([*names, parts, 1e6 * s, "chosen" * ((shared, own) == chosen)])
    title = f"{cache.title} of {used} own tokens, {heads}, bfloat16"
    header = ["prompts: queries x tokens x warps x stages", "own", "parts", "us", ""]
    return [table(title, header, measured, device=device)]
