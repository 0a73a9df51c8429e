"""The dual's solver by Newton's method and by projected gradient, against one evaluation of the dual."""

from dataclasses import dataclass

import torch

from bench.run.candidates import timed
from bench.run.options import Repeats, Save
from bench.run.origin import origin
from bench.run.tables import Table, candidate_table, floor_shares, ratio_and_memory, times
from engine import dual
from kernels import dual_moments


@dataclass(frozen=True)
class Dual:
    """`engine.dual.solve` by Newton's method and by projected gradient, against one evaluation
    of value, gradient and Hessian."""

    prompts: int = 1000
    """Number of prompts."""
    responses: int = 128
    """Number of responses to each prompt."""
    constraints: int = 3
    """Number of constraints."""
    repeats: Repeats = 15
    save: Save = True


def run(config: Dual) -> dict:
    """Measures on the CPU in float64; returns the line of results.jsonl."""
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    P, G, J = config.prompts, config.responses, config.constraints
    reward = torch.randn(P, G, generator=generator, dtype=torch.float64)
    utility = torch.randn(P, G, J, generator=generator, dtype=torch.float64) - 0.5 * reward[..., None]
    problem = reward, utility, torch.linspace(0.2, 0.4, J), 1.0
    solutions = {method: dual.solve(*problem, method=method) for method in ("newton", "pgd")}
    residuals = [solution.kkt for solution in solutions.values()]
    if not max(residuals) <= 1e-10:
        raise SystemExit(f"KKT residuals {residuals}: more than 1e-10; nothing is timed")
    one = {"dual_moments": lambda: dual_moments(reward, utility, solutions["newton"].lam, 1.0)}
    steps = {method: lambda method=method: dual.solve(*problem, method=method) for method in solutions}
    measured = timed(steps, {"moments": one}, config.repeats, device)
    for row in measured["candidates"]:
        solution = solutions[row["name"]]
        row |= {"iterations": solution.iterations, "kkt": solution.kkt}
    return {"case": "dual", "shape": f"{P} x {G} x {J}", "keep_pages": False, **measured, **origin(device)}


def table(line: dict) -> Table:
    """Returns the table of a line."""
    title = f"dual: solve on {line['shape']} (prompts x responses x constraints), float64; "
    title += f"floor (one evaluation of the dual) {1000 * line['floor_s']:.1f} ms"
    columns = times() | floor_shares(line) | ratio_and_memory(line, ours="newton")
    columns["KKT residual"] = lambda c: f"{c['iterations']} iterations, {c['kkt']:.0e}"
    return candidate_table(line, title, columns)
