"""Whole smoke runs on several ranks, as the command makes them, compared with those of one process."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from engine import train
from engine.config import ALGORITHMS
from engine.ranks import Ranks
from engine.run.contents import read_contents
from engine.run.rows import PairStepRow
from engine.run.run import Stage
from engine.run.shards import Stored
from engine.run.store import read_whole
from tests.helpers.runs import SMOKE, files, write

# No number of ranks divides these.
ODD = ["--n-prompts", "11", "--slack-prompts", "5", "--eval-prompts", "7", "--iterations", "2"]


def few_prompts(folder: Path) -> list[str]:
    """Writes prompts to a folder; returns the flags. A rank reads all that a run has, and the hundreds of the
    smoke preset would take a third of the time of these runs."""
    rows = [
        {"prompt": f"{word} {i} {word.lower()}s."} for i in range(8) for word in ("Count", "Name", "Sort")
    ]
    return ["--prompts", write(folder / "few.jsonl", rows)]


def run(ranks: Ranks, algorithm: str, *flags: str) -> None:
    """Makes or resumes a run, as the command does after it has joined the ranks."""
    if flags[0] == "--resume":
        config = ALGORITHMS[algorithm].config_class(**read_contents(Path(flags[1])).config)
        config = replace(config, model_ranks=train.parse(algorithm, list(flags[2:])).model_ranks)
        ALGORITHMS[algorithm].train(config, resume=flags[1], ranks=ranks)
    else:
        ALGORITHMS[algorithm].train(train.parse(algorithm, [*SMOKE, *flags]), ranks=ranks)


def here(value: Tensor | Stored) -> Tensor:
    """Returns a tensor of a stage, also where it lies in shards."""
    return value.whole() if isinstance(value, Stored) else value


def same(one: Path, many: Path) -> None:
    """Compares a run with that of one process: the same files, tokens and texts, all else up to rounding.

    Losses are held against the run's largest one: the first loss of a policy gradient is 0 but for rounding.
    Before the first step of an update log-ratios are 0 and the signs of margins rounding alone, so the share
    of pairs in order is not compared. tests/policy/test_shared_steps.py compares gradients.
    """
    kept = [{name for name in files(run) if ".shards/" not in name} for run in (one, many)]
    assert kept[0] == kept[1] and len(kept[0]) > 15
    rows, others = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, many)
    )
    # Scores that are log-ratios are differences of log-probs, rounding too, in units of so many nats.
    unit = min([1.0, *(sd for row in rows if row["kind"] == "preference" for sd in row["log_ratio_sd"])])
    pairs = [(row["loss"], other["loss"]) for row, other in zip(rows, others, strict=True) if "loss" in row]
    assert max(abs(a - b) for a, b in pairs) <= 1e-5 * max(abs(a) for a, _ in pairs)
    for path in sorted((one / "stages").glob("*.safetensors")):
        (expected, content), (found, other) = (read_whole(run / "stages" / path.name) for run in (one, many))
        # The states below the adapter are kept by one process alone.
        assert expected.keys() - found.keys() <= {"lower_MD"} and not found.keys() - expected.keys()
        norm = error = 0.0
        for name, value in ((name, here(value)) for name, value in found.items()):
            if name.startswith(("adapter.", "last.")):
                norm += float(expected[name].double().square().sum())
                error += float((value - expected[name]).double().square().sum())
            elif not value.is_floating_point():
                assert value.equal(expected[name]), (path.name, name)
            elif value.numel() and "_moment." not in name:
                scale = max(1.0, float(expected[name].abs().max()))
                scale = scale / unit if name.startswith("scaled.") else scale
                assert (value - expected[name]).abs().max() <= 1e-5 * scale, (path.name, name)
        assert error <= (1e-5) ** 2 * norm, path.name
        texts = [stage["record"].get("fields", {}).get("texts") for stage in (content, other)]
        assert texts[0] == texts[1]
    verdicts = [json.loads((run / "evaluation.json").read_text()) for run in (one, many)]
    assert verdicts[0]["constraints"][0]["word"] == verdicts[1]["constraints"][0]["word"]


def at_the_second_step(act: Callable[[], None]) -> Callable[[Ranks], None]:
    """Returns what has rank 1 act after the second step of the first update."""
    seen, log = [], Stage.log

    def logged(self: Stage, row) -> None:
        log(self, row)
        if isinstance(row, PairStepRow):
            seen.append(row)
            if len(seen) == 2:
                act()

    def prepare(ranks: Ranks) -> None:
        if ranks.rank == 1:
            Stage.log = logged  # in the rank's own process

    return prepare
