"""Parts 1 to 6 of `python -m bench.gpu`, each of under nine minutes."""

from bench.gpu.kernels import attention_kernels, ceilings, decode, launches, sampling
from bench.gpu.steps import Step
from bench.gpu.suite import tests
from bench.gpu.tiles import decode_tiles, forward_tiles, row_tiles
from bench.run.cases import CASES

# Sizes of what the cases measure.
HEAD = {"rows": 8192, "repeats": 7}
ROLLOUT = {"rows": 256, "prompt": 256, "new": 512, "repeats": 1}
TRAIN_STEP = {"pairs": 32, "prompt": 256, "response": 256}
ITERATION = {"steps": 4, "prompts": 64, "new": 128}


def case(name: str, case: str, seconds: float, **options) -> Step:
    """Returns a step that runs a case of `bench.run` in bfloat16."""
    config, run, _ = CASES[case]
    options = {"dtype": "bfloat16", "save": False} | options
    return Step(name, seconds, lambda device: [run(config(**options, device=str(device)))])


def loss_head(shape: str, **options) -> Step:
    """Returns a step of `bench.run loss_head`."""
    options = {"shape": shape} | HEAD | options
    name = f"loss_head {shape} {options['rows']}{' frozen' if options.get('frozen') else ''}"
    return case(name, "loss_head", 25, **options)


def rollout(shape: str, **options) -> Step:
    """Returns a step of `bench.run rollout`."""
    options = {"shape": shape} | ROLLOUT | options
    seconds = 110 if options.get("rivals", True) else 20
    return case(f"rollout {shape}", "rollout", seconds, **options)


def train_step(shape: str, tune: str, **options) -> Step:
    """Returns a step of `bench.run train_step`."""
    options = {"shape": shape, "tune": tune} | TRAIN_STEP | options
    return case(f"train_step {shape} {tune}", "train_step", 60, **options)


def iteration(shape: str, **options) -> Step:
    """Returns a step of `bench.run iteration`."""
    return case(f"iteration {shape}", "iteration", 100, **{"shape": shape} | ITERATION | options)


MEMCHECK, RACECHECK = (
    ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9") for tool in ("memcheck", "racecheck")
)
# The choice of GPU tests that a sanitizer, which is slow, gets through.
SMALL = "(211 and 8) or (attention_against and 64-9-3 and bfloat16) or (sampling_is and 5003) or forward_only"
GPU_TESTS = "tests/test_gpu.py"
# Number -> (title, steps).
PARTS: dict[int, tuple[str, list[Step]]] = {
    1: (
        "bare products and the loss head",
        [
            Step("ceilings", 30, ceilings),
            loss_head("qwen3-8b", budgets_mb=(3000,)),
            loss_head("qwen3-8b", frozen=True),
            loss_head("qwen2.5-0.5b"),
            loss_head("smollm2-135m"),
            loss_head("llama-3.2-1b"),
            loss_head("llama-3.1-8b"),
            loss_head("llama-3.1-8b", rows=1024),
            loss_head("qwen2.5-0.5b", rows=16384),
        ],
    ),
    2: (
        "tests",
        [
            tests("GPU tests", 150, ["-n0", GPU_TESTS]),
            tests("memcheck", 60, ["-n0", GPU_TESTS, "-k", SMALL], MEMCHECK),
            tests("racecheck", 60, ["-n0", GPU_TESTS, "-k", SMALL], RACECHECK),
            tests("all others", 130, ["-n8", "--maxprocesses=8", f"--ignore={GPU_TESTS}"]),
        ],
    ),
    3: (
        "what was not known",
        [
            Step("packed attention", 25, attention_kernels),
            Step("launches", 10, launches),
            Step("decode attention", 40, decode),
            Step("sampling", 25, sampling),
        ],
    ),
    4: (
        "configurations",
        [
            Step("row kernel", 40, row_tiles),
            Step("forward without gradients", 60, forward_tiles),
            Step("decode tiles", 60, decode_tiles),
        ],
    ),
    5: (
        "rollout and training step",
        [
            rollout("qwen2.5-0.5b"),
            train_step("qwen2.5-1.5b", "full"),
            rollout("qwen2.5-1.5b"),
            train_step("qwen2.5-0.5b", "lora"),
            rollout("llama-3.2-1b", rivals=False),
        ],
    ),
    6: ("whole iterations", [iteration("qwen2.5-0.5b"), iteration("llama-3.2-1b")]),
}
