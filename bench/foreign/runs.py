"""The runs of the study and what is read of them."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.foreign.pairs import FAR, ONE_LOOK, RULES, SLACK_NATS, SPIKE, UNFINISHED, Pair, spec
from engine import constraints
from engine.errors import UserError
from engine.policy.samples import Samples
from engine.run.committed import Committed, read_committed
from engine.run.rows import DualRow, IterationRow, ReferenceRow, StepRow
from engine.stages.reference import ReferenceSamples, units_of
from engine.verdict.evaluation import Evaluation

REFUSED = "refused"


class Asked(NamedTuple):
    """What a run is asked to do."""

    pair: Pair
    b: float
    seed: int
    rules: str  # of bench.foreign.pairs.RULES

    @property
    def name(self) -> str:
        """Names the folder in which the run stands alone."""
        pair = f"{self.pair.reward}-{self.pair.cost}".replace("--", "-less_")
        return f"{pair}-b{self.b:g}-seed{self.seed}-{self.rules}"

    @property
    def key(self) -> tuple:
        """Tells its measures from those of other runs."""
        return str(self.pair), self.b, self.seed, self.rules


def train(folder: Path, asked: Asked, flags: Sequence[str], samples: Path | None) -> None:
    """Trains a run, or goes on with it; one that has its verdict is left as it is.

    samples: a run with the same reference's samples. Raises: UserError where the run fails, but not where its
    threshold is refused (`is_refused`).
    """
    if (folder / "evaluation.json").is_file():
        return
    words = ["--resume", str(folder)]
    if not (folder / "config.json").is_file():
        words = [f"--reward={spec(asked.pair.reward)}", f"--cost={spec(asked.pair.cost)}", "--audit"]
        words += ["--threshold", str(asked.b), "--seed", str(asked.seed), "--out", str(folder)]
        words += [*ONE_LOOK, *RULES[asked.rules], *flags]
        words += ["--samples-of", str(samples)] if samples and samples != folder else []
    done = subprocess.run(
        [sys.executable, "-m", "engine.train", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 2 and is_refused(folder):
        return  # The samples do not support the threshold.
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{folder}: exit code {done.returncode}: {last}")


def is_refused(folder: Path) -> bool:
    """Tells whether a run has samples of its reference and no multiplier for its threshold."""
    if not (folder / "config.json").is_file():
        return False
    run = read_committed(folder)
    return bool(run.rows(ReferenceRow)) and not run.rows(DualRow)


def read(folder: Path, asked: Asked) -> dict:
    """Returns the measures of a run that has a verdict, or the word REFUSED alone (`is_refused`)."""
    run = read_committed(folder)
    row = {
        "pair": str(asked.pair),
        "b": asked.b,
        "seed": asked.seed,
        "rules": asked.rules,
        "dtype": run.config.dtype,
        "commit": run.contents.versions["commit"],
    }
    if is_refused(folder):
        return row | {"word": REFUSED}
    e = Evaluation.read(folder / "evaluation.json", cure="run it again")
    c, dual, losses = e.constraints[0], run.one(DualRow), [row.loss for row in run.rows(StepRow)]
    iterations = run.rows(IterationRow)
    lam = [row.lam[0] for row in iterations] or [dual.lam[0]]
    tilt = tilt_kl(run.load("reference", ReferenceSamples).samples, lam[-1], run)
    spike = max(losses) / statistics.median(losses) if losses else math.nan
    return row | {
        "word": c.word,
        "improvement": c.estimate.mean,
        "low": c.estimate.low,
        "high": c.estimate.high,
        "off": abs(c.estimate.mean - asked.b),
        "reward": e.reward.mean,
        "kl": e.kl.mean,
        "tilt": tilt,
        "finished": list(e.finished),
        "spike": spike,
        "lam": lam,
        "aim": dual.aim[0],
        "ess": float(torch.as_tensor(dual.ess).mean()),
    }


def tilt_kl(samples: Samples, lam: float, run: Committed) -> float:
    """Returns the KL of the tilt at lambda on the reference's samples, nats; at most log G."""
    limits, beta = constraints.limits(run.config, run.one(ReferenceRow).names), run.config.beta
    scaled = units_of(run.one(ReferenceRow), limits, run.config.units).apply(samples.scores)
    score_PG = scaled.reward_PG + lam * scaled.utility_PGJ[..., 0]
    log_w = (score_PG / beta).log_softmax(1)
    return float((log_w.exp() * (log_w + math.log(score_PG.shape[1]))).sum(1).mean())


def ratio(row: dict) -> float:
    """Returns the KL of a run's policy over that of its tilt."""
    return row["kl"] / max(row["tilt"], 0.01)


def causes(row: dict) -> list[str]:
    """Names what tells that a run's policy ran away: KL, unfinished or loss."""
    lost = row["finished"][0] - row["finished"][1]
    signs = {
        "KL": row["kl"] > FAR * row["tilt"] + SLACK_NATS,
        "unfinished": lost > UNFINISHED,
        "loss": row["spike"] > SPIKE,
    }
    return [name for name, is_so in signs.items() if is_so]


def kept(path: Path) -> dict[tuple, dict]:
    """Returns the measures that stand in a file of JSON lines, by `Asked.key`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["pair"], row["b"], row["seed"], row["rules"]): row for row in rows}


def keep(path: Path, row: dict) -> None:
    """Adds the measures of a run to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
