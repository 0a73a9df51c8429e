"""The loss head against its floor and its rivals: the preference loss of pairs
of completions with a cached reference.

Everyone computes the same loss and its gradients in hidden and, unless the head is frozen, in the head.
Labels are 1, so that rivals without soft labels can take part. The floor is the bare matrix products of the
same shapes: forward and dH, and dW with the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.run.candidates import add_rivals, timed
from bench.run.measure import peak_bytes
from bench.run.options import Device, Dtype, KeepPages, Repeats, Save
from bench.run.origin import origin
from bench.run.states import entropy, sampled_states
from bench.run.tables import Table, candidate_table, floor_shares, pages, ratio_and_memory, times
from engine.run.machine import keep_freed_memory
from kernels import lagrangian_preference_loss, reference

SHAPES = {  # name: (D, V)
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "llama-3.2-1b": (2048, 128256),
    "llama-3.1-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
}
BETA = 0.1
LENGTH = 64  # tokens of each sequence
# Liger has no cached reference, so it is judged by the loss without one.
WITHOUT_REFERENCE = "liger chunked DPO"
# Leaves more out of the gradients than rounding would change.
ROUGH_TOLERANCE = 1e-3
ROUGH = "dualign, 1e-3 of the gradients left out"
# A step returns the loss and its gradients.
Step = Callable[[], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class LossHead:
    """Preference loss, forward and backward, against the bare matrix products and its rivals."""

    shape: str = "smollm2-135m"
    """Head: smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, llama-3.1-8b or qwen3-8b."""
    rows: int = 1024
    """Completion tokens in the batch, a multiple of 128."""
    frozen: bool = False
    """No gradient in the head."""
    sampled_at: float = 0.0
    """Temperature, also of the loss, at which the quickstart's model samples the responses whose states are
    taken; 0: random states, and temperature 1."""
    budgets_mb: tuple[int, ...] = ()
    """Further memory budgets, in MB, that ours is timed at."""
    dtype: Dtype = "float32"
    device: Device = "cpu"
    rivals: bool = True
    """Rivals too, not the floor alone."""
    keep_pages: KeepPages = False
    repeats: Repeats = 15
    save: Save = True


def run(config: LossHead) -> dict:
    """Measures one shape; returns the line of results.jsonl."""
    device = torch.device(config.device)
    if config.keep_pages:
        keep_freed_memory()
    x = make(config, getattr(torch, config.dtype), device)
    returned = sum(leaf.nbytes for leaf in x.leaves)
    eager_extra = peak_bytes(eager(x), device) - returned
    steps = candidates(x, eager_extra // 6)
    steps |= {f"dualign, {mb} MB": ours(x, 10**6 * mb) for mb in config.budgets_mb}
    _, not_run = add_rivals(steps, rivals(x) if config.rivals else {})
    errors = check(steps, x)
    products = floor(x)
    measured = timed(steps, products, config.repeats, device) | {"not_run": not_run}
    for row in measured["candidates"]:
        row["errors"] = errors[row["name"]]
        row["extra_bytes"] -= returned
    width, vocabulary = SHAPES[config.shape]
    return {
        "case": "loss_head",
        "shape": config.shape,
        "rows": config.rows,
        "width": width,
        "vocabulary": vocabulary,
        "dtype": config.dtype,
        "frozen": config.frozen,
        "sampled_at": config.sampled_at,
        "entropy": entropy(x.hidden.detach(), x.weight.detach(), x.temperature),
        "keep_pages": config.keep_pages,
        "flops": len(products) * 2 * config.rows * width * vocabulary,
        **measured,
        **origin(device),
    }


def table(line: dict) -> Table:
    """Returns the table of a line."""
    title = (
        f"loss_head: {line['shape']}, {line['rows']} rows x {line['width']} x {line['vocabulary']}, "
        f"{line['dtype']}, {'frozen head' if line['frozen'] else 'full fine-tuning'}{_states(line)}"
        f"{pages(line)}; "
        f"floor ({len(line['floor_layouts'])} bare products) {1000 * line['floor_s']:.1f} ms, "
        f"{line['flops'] / line['floor_s'] / 1e9:.0f} Gflop/s"
    )
    columns = times() | floor_shares(line) | ratio_and_memory(line)
    columns["largest relative error"] = lambda c: f"{max(c['errors'].values()):.0e}"
    return candidate_table(line, title, columns)


def _states(line: dict) -> str:
    """Says in a title which states they are; lines without them have random ones."""
    if not line.get("sampled_at"):
        return ""
    return f", states sampled at temperature {line['sampled_at']:g} ({line['entropy']:.1f} nats a token)"


@dataclass(frozen=True)
class Inputs:
    """One batch: K pairs, in each the chosen sequence before the rejected one, all of one length."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    cu_seqlens: Tensor  # [2 K + 1]
    pairs: Tensor  # [K, 2]
    ref_logprob: Tensor  # [2 K]
    frozen: bool
    temperature: float = 1.0

    @property
    def leaves(self) -> list[Tensor]:
        """Returns the tensors that gradients are wanted for."""
        return [self.hidden] if self.frozen else [self.hidden, self.weight]

    def with_gradients(self, loss: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss and its gradients in `leaves`, fresh in each call."""
        return loss.detach(), list(torch.autograd.grad(loss, self.leaves))


def make(config: LossHead, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Makes a batch whose pairs lie next to each other: sequence 2 k is chosen over sequence 2 k + 1.

    Raises: SystemExit where the states of a shape cannot be sampled.
    """
    width, vocabulary = SHAPES[config.shape]
    g = torch.Generator(device).manual_seed(0)
    n, rows, temperature = config.rows // LENGTH, config.rows, config.sampled_at or 1.0
    if config.sampled_at:
        hidden, weight, target = sampled_states(rows, temperature, dtype, device)
        if weight.shape != (vocabulary, width):
            raise SystemExit(f"--sampled-at: the quickstart's model has not the shape {config.shape}")
    else:
        hidden = torch.randn(rows, width, device=device, generator=g).to(dtype)
        weight = (torch.randn(vocabulary, width, device=device, generator=g) * 2 / width**0.5).to(dtype)
        target = torch.randint(vocabulary, (rows,), device=device, generator=g)
    # About the log-probs that the policy itself gives, so that margins are neither 0 nor saturated.
    ref_logprob = torch.randn(n, device=device, generator=g)
    if config.sampled_at:
        logprob = F.log_softmax((hidden @ weight.t()).float() / temperature, 1).gather(1, target[:, None])
        ref_logprob += logprob.view(n, -1).sum(1)
    else:
        ref_logprob -= LENGTH * 12.0
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(not config.frozen),
        target=target,
        cu_seqlens=torch.arange(n + 1) * LENGTH,
        pairs=torch.arange(n).view(-1, 2),
        ref_logprob=ref_logprob,
        frozen=config.frozen,
        temperature=temperature,
    )


def ours(
    x: Inputs,
    budget: int | None,
    op: Callable = lagrangian_preference_loss,
    *,
    tolerance: float | None = None,
) -> Step:
    """Returns the step of `kernels.lagrangian_preference_loss`, or of its twin, within `budget` bytes."""
    ones, pairs = torch.ones(len(x.pairs), device=x.hidden.device), x.pairs
    own = {"memory_budget_bytes": budget, "gradient_tolerance": tolerance}
    if op is reference.lagrangian_preference_loss:
        own, pairs = {}, pairs.to(x.hidden.device)

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = op(
            x.hidden,
            x.weight,
            x.target,
            x.cu_seqlens,
            pairs,
            None,
            None,
            None,
            x.ref_logprob,
            beta=BETA,
            labels="given",
            preference=ones,
            temperature=x.temperature,
            **own,
        ).loss
        return x.with_gradients(loss)

    return step


def _dpo(logprob: Tensor, x: Inputs) -> Tensor:
    """Returns the DPO loss from token log-probs [T]."""
    ratio = logprob.view(len(x.ref_logprob), -1).sum(1) - x.ref_logprob.to(logprob.dtype)
    return -F.logsigmoid(BETA * (ratio[::2] - ratio[1::2])).mean()


def _eager_loss(hidden: Tensor, weight: Tensor, x: Inputs) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    if x.temperature != 1:
        logits = logits / x.temperature
    return _dpo(logits.log_softmax(1).gather(1, x.target[:, None])[:, 0], x)


def eager(x: Inputs) -> Step:
    """Returns a step in plain torch: all logits, log_softmax, gather."""
    return lambda: x.with_gradients(_eager_loss(x.hidden, x.weight, x))


def compiled(x: Inputs) -> Step:
    """Returns the same under torch.compile."""
    function = torch.compile(lambda hidden, weight: _eager_loss(hidden, weight, x))
    return lambda: x.with_gradients(function(x.hidden, x.weight))


def cce(x: Inputs) -> Step:
    """Returns a step of Apple's CCE with per-token losses, on the CPU in its torch_compile form."""
    from cut_cross_entropy import linear_cross_entropy

    kind = "cce_exact" if x.hidden.is_cuda else "torch_compile"

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = linear_cross_entropy(x.hidden / x.temperature, x.weight, x.target, reduction="none", impl=kind)
        return x.with_gradients(_dpo(-loss, x))

    return step


def torch_linear(x: Inputs, chunked: bool) -> Step:
    """Returns a step of torch's own linear_cross_entropy (2.13), as a whole or in chunks."""
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = F.linear_cross_entropy(
            x.hidden / x.temperature, x.weight, x.target, reduction="none", options=options
        )
        return x.with_gradients(_dpo(-loss, x))

    return step


def liger(x: Inputs) -> Step:
    """Returns a step of Liger's chunked DPO loss without a reference model.

    It takes no cached reference, which would only shift the margins.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compute_nll_loss=False)
    n, width = len(x.ref_logprob), x.hidden.shape[1]
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)]).to(x.hidden.device)

    def step() -> tuple[Tensor, list[Tensor]]:
        hidden = (x.hidden / x.temperature).view(n, -1, width)
        loss = loss_of(x.weight, hidden[order], x.target.view(n, -1)[order])[0]
        return x.with_gradients(loss)

    return step


def exact(x: Inputs, with_reference: bool) -> tuple[Tensor, list[Tensor]]:
    """Returns loss and gradients in float64, without a cached reference for rivals that have none."""
    ref_logprob = x.ref_logprob if with_reference else torch.zeros_like(x.ref_logprob)
    moved = Inputs(
        hidden=x.hidden.detach().double().requires_grad_(),
        weight=x.weight.detach().double().requires_grad_(not x.frozen),
        target=x.target,
        cu_seqlens=x.cu_seqlens,
        pairs=x.pairs,
        ref_logprob=ref_logprob.double(),
        frozen=x.frozen,
        temperature=x.temperature,
    )
    return eager(moved)()


def floor(x: Inputs) -> dict[str, dict[str, Callable[[], object]]]:
    """Returns product -> layout -> step: the bare products in the layouts that torch.mm offers,
    into memory that exists already."""
    with torch.no_grad():
        h, w = x.hidden.detach(), x.weight.detach()
        z = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device).normal_()
        zt, ht, wt = z.t().contiguous(), h.t().contiguous(), w.t().contiguous()
        dz, dzt, dh, dht = (torch.empty_like(tensor) for tensor in (z, zt, h, ht))
        products = {
            "forward": {
                "H W'": lambda: torch.mm(h, w.t(), out=dz),
                "H (W')": lambda: torch.mm(h, wt, out=dz),
                "W H'": lambda: torch.mm(w, h.t(), out=dzt),
            },
            "dH": {
                "G W": lambda: torch.mm(z, w, out=dh),
                "(G')' W": lambda: torch.mm(zt.t(), w, out=dh),
                "W' G'": lambda: torch.mm(w.t(), zt, out=dht),
            },
        }
        if not x.frozen:
            dw, dwt = torch.empty_like(w), torch.empty_like(wt)
            products["dW"] = {
                "G' H": lambda: torch.mm(z.t(), h, out=dw),
                "(G') H": lambda: torch.mm(zt, h, out=dw),
                "H' G": lambda: torch.mm(ht, z, out=dwt),
            }
    return products


def candidates(x: Inputs, sixth: int) -> dict[str, Step]:
    """Returns our steps; `sixth` is the small memory budget in bytes."""
    steps = {"dualign": ours(x, 1 << 40)}
    if not x.hidden.is_cuda:
        steps["dualign, nothing left out"] = ours(x, 1 << 40, tolerance=0.0)
        steps[ROUGH] = ours(x, 1 << 40, tolerance=ROUGH_TOLERANCE)
    if not x.frozen:
        steps["dualign, 1/6 of eager's memory"] = ours(x, sixth)
    return steps


def rivals(x: Inputs) -> dict[str, Callable[[], Step]]:
    """Returns name -> how to make the step, of those that are installed."""
    makers = {"torch eager": eager, "torch.compile": compiled}
    if hasattr(F, "linear_cross_entropy"):
        makers["torch linear_cross_entropy"] = partial(torch_linear, chunked=False)
        makers["torch linear_cross_entropy, chunked"] = partial(torch_linear, chunked=True)
    if find_spec("liger_kernel"):
        makers[WITHOUT_REFERENCE] = liger
    if find_spec("cut_cross_entropy"):
        makers["cce"] = cce
    return {name: partial(make, x) for name, make in makers.items()}


def check(steps: dict[str, Step], x: Inputs) -> dict[str, dict[str, float]]:
    """Returns relative errors of loss and gradients against float64, largest difference over largest value; a
    rival's are only reported.

    Raises: SystemExit where ours are more than twice those of the plain torch twin
    (`kernels.reference`) plus 4 eps, and what ROUGH may leave out.
    """
    kinds = {name != WITHOUT_REFERENCE for name in steps}
    truth = {with_reference: exact(x, with_reference) for with_reference in kinds}
    twin = _errors(ours(x, 1 << 30, reference.lagrangian_preference_loss), truth[True])
    errors_of = {name: _errors(step, truth[name != WITHOUT_REFERENCE]) for name, step in steps.items()}
    eps = torch.finfo(x.hidden.dtype).eps
    for name, errors in errors_of.items():
        more = ROUGH_TOLERANCE if name == ROUGH else 0
        bad = {k: e for k, e in errors.items() if not e <= 2 * twin[k] + 4 * eps + more}
        if name.startswith("dualign") and bad:
            raise SystemExit(f"{name}: relative errors {bad} against {twin} of plain torch; nothing is timed")
    return errors_of


def _errors(step: Step, truth: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    loss, gradients = step()
    pairs = zip(("loss", "d_hidden", "d_weight"), (loss, *gradients), (truth[0], *truth[1]), strict=False)
    return {name: float((got.double() - true).abs().max() / true.abs().max()) for name, got, true in pairs}
