"""Part 0: an answer to everything that only a GPU can say, most valuable first, in six and a half minutes."""

from dataclasses import replace
from functools import partial

import torch

from bench.gpu.kernels import ceilings
from bench.gpu.parts import GPU_TESTS, PARTS, iteration, loss_head, rollout, train_step
from bench.gpu.steps import BF16, Figure, Step, table
from bench.gpu.suite import HEADER, tests
from bench.gpu.tiles import forward_tiles, row_tiles
from bench.run import shapes
from bench.run.states import entries_above, states_of

LIMIT_S = 6.5 * 60
TITLE = "what matters most"
# A case of each kernel, in bfloat16, and whole rollouts and updates.
KERNELS = (
    "float64 and 32001-64-torch.bfloat16 and (False-None or True-12)",
    "forms_of_labels and listwise-False-12-torch.bfloat16",
    "forward_only",
    "a_new_lambda and soft",
    "decode_attention_against and None and (64-9-3 or 128-16-2) and bfloat16",
    "norm_rotation and 300-4096 and bfloat16",
    "sampling_is_that and 5003-torch.bfloat16",
    "by_runs and torch.bfloat16-groups and not window",
    "rollouts_by_captured",
    "16_bit_log_probs",
    "repeat_bitwise and CaidConfig",
)
CHOSEN = ["-o", "addopts=", GPU_TESTS, "-k", " or ".join(f"({kernel})" for kernel in KERNELS)]
CEILINGS: dict[str, int] = {}  # as they are in part 1
# (logits at a time, warps) of the row kernel, and (width, vocabulary) of a head that the kernel without
# stored logits is for.
ROWS = {"tiles": ((2048, 8), (4096, 8), (4096, 16), (8192, 16))}
FORWARD = {"heads": ((896, 151936),)}
ENTRIES_ROWS, TEMPERATURES, POWERS = 1024, (0.7, 1.0), (12, 16, 18, 20, 24, 28)

# What is predicted below was reckoned before any of it ran on a GPU, for an H200 that copies 4.3 TB/s and
# multiplies 790 Tflop/s: large products reach 93 % of that, and streams 88 % of a copy. It may be wrong by
# 6 % for the loss head and by 20 % for the rest.
COPY_GB, PRODUCT_TFLOP = 4300, 790
LARGE, STREAM = 0.93, 0.88


def steps(model: str) -> list[Step]:
    """Lists the steps, most valuable first.

    model: folder of the checkpoint whose entries are counted; empty where there is none.
    """
    alone = {"rivals": False}
    full, frozen = loss_head("qwen3-8b", **alone), loss_head("qwen3-8b", frozen=True, **alone)
    counted = [Step("entries", 25, partial(entries, model=model), entry_counts)]
    return [
        tests("kernels against float64", 60, CHOSEN, limit_s=60, figures=test_counts),
        Step("ceilings", 20, partial(ceilings, **CEILINGS), ceiling_rates),
        replace(full, figures=partial(over_products, predicted=1.07, ms=44.5, most=1.12)),
        replace(frozen, seconds=20, figures=partial(over_products, predicted=1.10, ms=30.5, most=1.17)),
        replace(rollout("qwen2.5-1.5b", **alone), seconds=35, figures=partial(of_floor, share=0.45, ms=3.4)),
        replace(rollout("qwen2.5-0.5b", **alone), seconds=25, figures=partial(of_floor, share=0.35, ms=1.63)),
        replace(train_step("qwen2.5-1.5b", "full", **alone), seconds=45, figures=of_rate),
        replace(iteration("qwen2.5-0.5b", repeats=1, **alone), seconds=50, figures=whole),
        *(counted if model else ()),
        Step("row kernel, four tiles", 20, partial(row_tiles, **ROWS), chosen_rows),
        Step("forward, one head", 25, partial(forward_tiles, **FORWARD), chosen_forward),
    ]


def steps_of(part: int, model: str) -> list[Step]:
    """Lists the steps of any part."""
    return PARTS[part][1] if part else steps(model)


def entries(device: torch.device, model: str) -> list[dict]:
    """Counts the entries of the loss head's gradients that matter, on states of a checkpoint."""
    rows = []
    with shapes.opened(model, "", BF16, device) as (name, folder, decoder):
        for temperature in TEMPERATURES:
            hidden, weight, target = states_of(folder, decoder, ENTRIES_ROWS, temperature)
            bounds = tuple(2.0**-power for power in POWERS)
            counts, left_out = entries_above(hidden, weight, target, temperature, bounds)
            per_row = counts.double()
            found = (per_row.mean(0), per_row.median(0).values, per_row.amax(0), left_out.mean(0))
            for power, *numbers in zip(POWERS, *(x.tolist() for x in found), strict=True):
                rows.append([temperature, f"2^-{power}", *numbers])
    title = f"Entries of softmax - onehot, {ENTRIES_ROWS} rows of {len(weight)} that {name} sampled, bfloat16"
    header = ["temperature", "at least", "a row, mean", "median", "most", "sum of the others, mean"]
    return [table(title, header, rows, device=device)]


def test_counts(lines: list[dict]) -> list[Figure]:
    """Returns how many tests passed and failed."""
    row = dict(zip(HEADER, lines[0]["table"][0], strict=True))
    failed = Figure("failed", "tests", row["failed"], target="0")
    return [Figure("passed", "tests", row["passed"]), failed]


def ceiling_rates(lines: list[dict]) -> list[Figure]:
    """Returns the rates of a copy, of a square product and of the three products of a loss head."""
    rates = {row[0]: row[2] for row in lines[0]["table"]}
    square = next(name for name in rates if " x " in name and "bfloat16" in name)
    return [
        Figure("copy", "GB/s", rates["copy, GB/s"], COPY_GB),
        Figure("square product", "Tflop/s", rates[square], PRODUCT_TFLOP),
        Figure(
            "three products", "Tflop/s", rates["the three, bfloat16 output, Tflop/s"], LARGE * PRODUCT_TFLOP
        ),
    ]


def _ours(lines: list[dict]) -> dict:
    return next(c for c in lines[0]["candidates"] if c["name"] == "dualign")


def over_products(lines: list[dict], predicted: float, ms: float, most: float) -> list[Figure]:
    """Returns the time of the loss head over that of the bare products, and in ms."""
    ours = _ours(lines)
    return [
        Figure("time over the bare products'", "x", 1 / ours["floor_share"], predicted, f"at most {most}"),
        Figure("time", "ms", 1000 * ours["median_s"], ms),
    ]


def of_floor(lines: list[dict], share: float, ms: float) -> list[Figure]:
    """Returns the share of its floor by bytes and flops that a rollout reaches, and its ms a step."""
    ours = _ours(lines)
    return [
        Figure("share of the floor", "", ours["computed_share"], share, "at least 0.5"),
        Figure("a step", "ms", 1000 * ours["step_s"], ms),
    ]


def of_rate(lines: list[dict]) -> list[Figure]:
    """Returns the share of the rate of products that a training step reaches, and its ms."""
    ours = _ours(lines)
    return [
        Figure("share of the rate of products", "", ours["rate_share"], 0.62, "at least 0.5"),
        Figure("time", "ms", 1000 * ours["median_s"], 440),
    ]


def whole(lines: list[dict]) -> list[Figure]:
    """Returns the seconds of an iteration, and of its stages."""
    return [Figure(c["name"], "s", c["median_s"]) for c in reversed(lines[0]["candidates"])]


def entry_counts(lines: list[dict]) -> list[Figure]:
    """Returns the mean entries of a row."""
    rows = lines[0]["table"]
    return [Figure(f"T {row[0]}, {row[1]}:", "entries a row", row[2]) for row in rows]


def _chosen(lines: list[dict]) -> float:
    """Returns the last number of the row whose configuration the kernels choose."""
    return next(row[-2] for row in lines[0]["table"] if row[-1] == "chosen")


def chosen_rows(lines: list[dict]) -> list[Figure]:
    """Returns what the chosen row kernel reaches."""
    return [Figure("chosen", "% of a copy", _chosen(lines), 100 * STREAM)]


def chosen_forward(lines: list[dict]) -> list[Figure]:
    """Returns what the chosen way to log-probs without gradients reaches."""
    return [Figure("chosen", "% of the bare product", _chosen(lines))]
