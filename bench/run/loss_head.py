"""The loss head against its floor and its rivals: the preference loss of pairs of completions with a cached reference.

Everyone computes the same loss (labels 1, so that rivals without soft labels can) and its gradients in hidden and, unless the head is
frozen, in the head. The floor is the bare matrix products of the same shapes: forward and dH, and dW with the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import lagrangian_preference_loss, reference

SHAPES = {  # name: (D, V)
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "llama-3.2-1b": (2048, 128256),
    "llama-3.1-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
}
BETA = 0.1


@dataclass(frozen=True)
class Inputs:
    """One batch: K pairs, chosen sequences first, then rejected ones, all of one length."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    cu_seqlens: Tensor  # [2 K + 1]
    pairs: Tensor  # [K, 2]
    ref_logprob: Tensor  # [2 K]
    frozen: bool

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are wanted for."""
        return [self.hidden] if self.frozen else [self.hidden, self.weight]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients of the loss in `leaves`, fresh in each call."""
        return list(torch.autograd.grad(loss, self.leaves))


def make(shape: str, rows: int, frozen: bool, dtype: torch.dtype, device: torch.device, length: int = 64) -> Inputs:
    """A batch whose pairs lie next to each other: sequence 2 k is chosen over sequence 2 k + 1."""
    width, vocabulary = SHAPES[shape]
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, device=device, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device, generator=g) * 2 / width**0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), device=device, generator=g)
    n = rows // length
    pairs = torch.arange(n).view(-1, 2)
    # About what the policy itself gives, so that margins are neither 0 nor saturated.
    reference = torch.randn(n, device=device, generator=g) - length * 12.0
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(not frozen),
        target,
        torch.arange(n + 1) * length,
        pairs,
        reference,
        frozen,
    )


def ours(x: Inputs, budget: int | None, op: Callable = lagrangian_preference_loss) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """`kernels.lagrangian_preference_loss`, or its twin, within `budget` bytes."""
    ones = torch.ones(len(x.pairs))

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = op(
            x.hidden, x.weight, x.target, x.cu_seqlens, x.pairs, None, None, None, x.ref_logprob, beta=BETA, labels="given",
            preference=ones, memory_budget_bytes=budget,
        ).loss  # fmt: skip
        return loss.detach(), x.gradients(loss)

    return step


def _dpo(logprob: Tensor, x: Inputs) -> Tensor:
    """DPO loss from token log-probs [T]."""
    ratio = logprob.view(len(x.ref_logprob), -1).sum(1) - x.ref_logprob.to(logprob.dtype)
    return -F.logsigmoid(BETA * (ratio[::2] - ratio[1::2])).mean()


def _eager_loss(hidden: Tensor, weight: Tensor, x: Inputs) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return _dpo(logits.log_softmax(1).gather(1, x.target[:, None])[:, 0], x)


def eager(x: Inputs) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """All logits, log_softmax, gather, in plain torch."""

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = _eager_loss(x.hidden, x.weight, x)
        return loss.detach(), x.gradients(loss)

    return step


def compiled(x: Inputs) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """The same under torch.compile."""
    function = torch.compile(lambda hidden, weight: _eager_loss(hidden, weight, x))

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = function(x.hidden, x.weight)
        return loss.detach(), x.gradients(loss)

    return step


def cce(x: Inputs) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Apple's CCE with per-token losses; on the CPU its torch_compile form."""
    from cut_cross_entropy import linear_cross_entropy

    kind = "cce_exact" if x.hidden.is_cuda else "torch_compile"

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = _dpo(-linear_cross_entropy(x.hidden, x.weight, x.target, reduction="none", impl=kind), x)
        return loss.detach(), x.gradients(loss)

    return step


def liger(x: Inputs) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Liger's chunked DPO loss without a reference model: it has no cached one, so the references enter as a shift of nothing."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compute_nll_loss=False)
    n, width = len(x.ref_logprob), x.hidden.shape[1]
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)]).to(x.hidden.device)

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = loss_of(x.weight, x.hidden.view(n, -1, width)[order], x.target.view(n, -1)[order])[0]
        return loss.detach(), x.gradients(loss)

    return step


def exact(x: Inputs, with_reference: bool) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in float64, without a cached reference for rivals that have none."""
    hidden, weight = x.hidden.detach().double().requires_grad_(), x.weight.detach().double().requires_grad_(not x.frozen)
    moved = Inputs(
        hidden,
        weight,
        x.target,
        x.cu_seqlens,
        x.pairs,
        x.ref_logprob.double() if with_reference else torch.zeros_like(x.ref_logprob).double(),
        x.frozen,
    )
    return eager(moved)()


def floor(x: Inputs) -> dict[str, dict[str, Callable[[], object]]]:
    """The bare products, each in the layouts that torch.mm offers, into memory that is there: product -> layout -> step."""
    with torch.no_grad():
        h, w = x.hidden.detach(), x.weight.detach()
        z = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device).normal_()
        zt, ht, wt = z.t().contiguous(), h.t().contiguous(), w.t().contiguous()
        out = {"z": torch.empty_like(z), "zt": torch.empty_like(zt), "dh": torch.empty_like(h), "dht": torch.empty_like(ht)}
        products = {
            "forward": {
                "H W'": lambda: torch.mm(h, w.t(), out=out["z"]),
                "H (W')": lambda: torch.mm(h, wt, out=out["z"]),
                "W H'": lambda: torch.mm(w, h.t(), out=out["zt"]),
            },
            "dH": {
                "G W": lambda: torch.mm(z, w, out=out["dh"]),
                "(G')' W": lambda: torch.mm(zt.t(), w, out=out["dh"]),
                "W' G'": lambda: torch.mm(w.t(), zt, out=out["dht"]),
            },
        }
        if not x.frozen:
            out["dw"], out["dwt"] = torch.empty_like(w), torch.empty_like(wt)
            products["dW"] = {
                "G' H": lambda: torch.mm(z.t(), h, out=out["dw"]),
                "(G') H": lambda: torch.mm(zt, h, out=out["dw"]),
                "H' G": lambda: torch.mm(ht, z, out=out["dwt"]),
            }
    return products


def candidates(x: Inputs, sixth: int) -> dict[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
    """Ours; `sixth`: bytes of the small budget."""
    found = {"dualign": ours(x, 1 << 40)}
    if not x.frozen:
        found["dualign, 1/6 of eager's memory"] = ours(x, sixth)
    return found


def rivals(x: Inputs) -> dict[str, Callable[[], Callable[[], tuple[Tensor, list[Tensor]]]]]:
    """How to make the steps of those that are installed."""
    found = {"torch eager": eager, "torch.compile": compiled}
    if find_spec("liger_kernel"):
        found["liger chunked DPO"] = liger
    if find_spec("cut_cross_entropy"):
        found["cce"] = cce
    return {name: partial(make, x) for name, make in found.items()}


def check(steps: dict[str, Callable[[], tuple[Tensor, list[Tensor]]]], x: Inputs) -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradients against float64, largest difference over largest value; a rival's are only reported.

    Raises: SystemExit where ours are more than twice those of the plain torch twin (`kernels.reference`) plus 4 eps.
    """
    truth = {with_reference: exact(x, with_reference) for with_reference in {name != "liger chunked DPO" for name in steps}}
    twin = _errors(ours(x, 1 << 30, reference.lagrangian_preference_loss), truth[True])
    found = {name: _errors(step, truth[name != "liger chunked DPO"]) for name, step in steps.items()}
    for name, errors in found.items():
        bad = {k: e for k, e in errors.items() if not e <= 2 * twin[k] + 4 * torch.finfo(x.hidden.dtype).eps}
        if name.startswith("dualign") and bad:
            raise SystemExit(f"{name}: relative errors {bad} against {twin} of plain torch; nothing is timed")
    return found


def _errors(step: Callable[[], tuple[Tensor, list[Tensor]]], truth: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    loss, gradients = step()
    pairs = zip(("loss", "d_hidden", "d_weight"), (loss, *gradients), (truth[0], *truth[1]), strict=False)
    return {name: float((got.double() - true).abs().max() / true.abs().max()) for name, got, true in pairs}
