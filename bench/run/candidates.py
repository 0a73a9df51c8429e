"""Rivals that may not run, and the times of candidates beside those of their floors."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from bench.run import floors
from bench.run.measure import interleaved, peak_bytes


def add_rivals(
    steps: dict[str, Callable], makers: dict[str, Callable[[], Callable]]
) -> tuple[dict[str, object], dict[str, str]]:
    """Adds to `steps` each rival that can be made and called.

    Returns name -> the answer of its first call, and the name of each other rival -> its error.
    """
    answers, not_run = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            answers[name] = step()
        except Exception as error:
            not_run[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        steps[name] = step
    if not_run and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers, not_run


def timed(
    steps: dict[str, Callable],
    products: dict[str, dict[str, Callable]],
    repeats: int,
    device: torch.device,
    *,
    needed: dict[str, float] | None = None,
    parts: list[floors.Part] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Times the candidates and the products of their floor in turn; returns these keys of a line of results.

    They are a row per candidate, the seconds of the floor, and the fastest way of each product.
    needed: how often the floor counts each product; once where it is left out.
    parts: work whose bytes and flops give a second floor, which is returned with the rates that it rests on.
    """
    bare = {f"{product} / {way}": step for product, ways in products.items() for way, step in ways.items()}
    probes = floors.probes(dtype, device) if parts else {}
    times = interleaved(steps | bare | {name: probe.step for name, probe in probes.items()}, repeats, device)

    def seconds(product: str, way: str) -> float:
        return times[f"{product} / {way}"]["median"]

    fastest = {p: min(ways, key=lambda way, p=p: seconds(p, way)) for p, ways in products.items()}
    floor_s = sum((needed or {}).get(p, 1) * seconds(p, way) for p, way in fastest.items())
    rows = [
        {
            "name": name,
            **in_seconds(times[name]),
            "floor_share": floor_s / times[name]["median"],
            "extra_bytes": peak_bytes(step, device),
        }
        for name, step in steps.items()
    ]
    measured = {"repeats": repeats, "floor_s": floor_s, "floor_layouts": fastest, "candidates": rows}
    if parts:
        rates = floors.rates(probes, times)
        computed = floors.seconds(parts, rates)
        measured |= {"bytes": sum(p.bytes for p in parts), "flops": sum(p.flops for p in parts)}
        measured |= asdict(rates)
        measured |= {"computed_s": sum(computed.values()), "computed_parts_s": computed}
        for row in rows:
            row["computed_share"] = measured["computed_s"] / row["median_s"]
    return measured


def in_seconds(times: dict[str, float]) -> dict[str, float]:
    """Names the times of `interleaved` as a line of results does."""
    return {f"{name}_s": value for name, value in times.items()}
