"""The cases of `python -m bench.run`, a row for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.run import attention, dual, growth, iteration, loss_head, rollout, scoring, train_step
from bench.run.tables import Table


class Case(NamedTuple):
    """A case: the class of its options, and its two functions."""

    config: type
    run: Callable[[Any], dict]  # options -> line of results.jsonl
    table: Callable[[dict], Table]  # line -> table


CASES = {
    "loss_head": Case(loss_head.LossHead, loss_head.run, loss_head.table),
    "rollout": Case(rollout.Rollout, rollout.run, rollout.table),
    "train_step": Case(train_step.TrainStep, train_step.run, train_step.table),
    "scoring": Case(scoring.Scoring, scoring.run, scoring.table),
    "attention": Case(attention.Attention, attention.run, attention.table),
    "iteration": Case(iteration.Iteration, iteration.run, iteration.table),
    "growth": Case(growth.Growth, growth.run, growth.table),
    "dual": Case(dual.Dual, dual.run, dual.table),
}
