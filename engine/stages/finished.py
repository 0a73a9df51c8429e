"""A run with iterates, opened to be judged again: what it was made from, with the flags of the evaluation.

`engine.evaluate` judges it on held-out prompts (`engine/stages/evaluate.py`) or on the sets of a profile
(`engine/stages/profile.py`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from torch import Tensor

from engine.config import EvaluateConfig, RunConfig, check, shown_name
from engine.errors import UserError
from engine.files import is_there
from engine.looks import Size
from engine.model.decoder import Decoder
from engine.policy.sharded import ShardedWeights
from engine.policy.steps import Policy
from engine.policy.weights import Weights, trained_weights
from engine.ranks import ALONE, Ranks
from engine.records import Prompts
from engine.run.committed import Committed, read_committed
from engine.run.display import Display, Progress
from engine.run.folder import RunFolder
from engine.run.plan import evaluation_rows
from engine.run.rows import Row, SampledRow, SpeedRow
from engine.run.shards import Stored
from engine.scorers.answers import Answers
from engine.scorers.base import Scorers
from engine.scorers.find import content, sizes
from engine.stages.alike import check_model_ranks, check_same_inputs, check_seen, program
from engine.stages.inputs import DEFAULT_MODEL, Inputs, clock, prepare_process, read_inputs, scorers_of
from engine.stages.job import SamplingSettings, Subject
from engine.stages.run_inputs import OwnedInputs, owned_inputs
from engine.stages.sampling import gap_text
from engine.verdict.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run to judge, read and checked; no weights are loaded yet."""

    run: Path
    owned: OwnedInputs
    committed: Committed  # what its stages hold
    config: RunConfig  # the run's, with the flags' device, threads, number of responses and further audits
    # Those to choose from, with the multipliers that each was trained at; one unless every one is asked for.
    iterates: dict[int, list[float]]
    inputs: Inputs
    ranks: Ranks
    answers: Answers = field(default_factory=Answers)  # of judges behind HTTP

    @property
    def looked_at(self) -> Size:
        """Returns the prompts and responses of the run's verdict, or of its first look before it."""
        try:
            found = Evaluation.read(RunFolder(self.run).evaluation, cure="run it again")
        except UserError:
            return Size(self.config.eval_prompts, self.config.eval_responses)
        return Size(found.n_prompts, found.n_responses)

    @property
    def algorithm(self) -> str:
        """Returns the name of the run's algorithm."""
        return self.committed.contents.algorithm

    def rows(self, groups: Sequence[Prompts], most: int) -> int:
        """Returns how many responses to prompts of these groups are decoded side by side, where so many as
        `most` prompts are scored at once; on several ranks what the tightest has room for. Raises: UserError
        where there is no room for one prompt's."""
        config, inputs = self.config, self.inputs
        asked = [len(ids) for group in groups for ids in group.token_ids]
        beside = sizes(
            config,
            folder=inputs.folder,
            trunk=inputs.fingerprint,
            dtype=inputs.dtype,
            device=inputs.device,
        )
        own = evaluation_rows(
            config, inputs.shape, inputs.dtype, inputs.device, asked, most, beside, self.ranks
        )
        return min(self.ranks.gather(own))

    def scorer_contents(self) -> dict[str, dict[str, str]]:
        """Says what the run's scorers and further audits are now, as `engine.scorers.find.content` does."""
        config, inputs = self.config, self.inputs
        return content(config.reward, config.cost, config.audit, folder=inputs.folder)

    def check_alike(self, contents: Mapping[str, Mapping[str, str]], prompts: Sequence[Prompts]) -> None:
        """Checks that all ranks have read the same. contents: `scorer_contents`. Raises: UserError."""
        check_same_inputs(self.ranks, self.inputs, contents, prompts)

    def scorers(
        self, contents: Mapping[str, Mapping[str, str]], *, accept_changes: bool
    ) -> tuple[Scorers, list[str]]:
        """Loads the run's scorers and further audits; says which have changed since the run began.

        contents: `scorer_contents`.

        Raises: UserError for changed ones, unless these are accepted.
        """
        config, inputs = self.config, self.inputs
        changed = self.owned.check_scorers(contents, accept=accept_changes)
        read_only = not (self.ranks.is_first and os.access(self.run, os.W_OK))
        self.answers.keep_in(RunFolder(self.run).judge_cache, read_only=read_only)
        return scorers_of(config, inputs, self.answers), changed

    def subject(self, config: RunConfig, scorers: Scorers, seed: int) -> Subject:
        """Loads the weights of the run's model. config: that of this run, with the rows that fit."""
        settings = replace(SamplingSettings.of(config), seed=seed)
        return replace(Subject.load(settings, self.inputs, scorers, self.ranks), answers=self.answers)

    def policy(self, model: Decoder, iterate: int) -> Weights:
        """Returns the weights of an iterate, on all ranks. Raises: UserError where its stage is damaged."""
        return trained_weights(model, self.config, self._trained(iterate, self.ranks))

    def tensors(self, weights: Weights, iterate: int) -> Mapping[str, Tensor | Stored]:
        """Returns the tensors of the weights of an iterate; of sharded ones, of which a rank has only some
        rows, those of its stage."""
        return self._trained(iterate) if isinstance(weights, ShardedWeights) else weights.tensors()

    def _trained(self, iterate: int, ranks: Ranks = ALONE) -> Mapping[str, Tensor | Stored]:
        return self.committed.load(f"iteration-{iterate}/policy", Policy, ranks).adapter

    def title(self, iterates: Sequence[int]) -> str:
        """Names iterates, the run, its algorithm and its model."""
        which = ", ".join(map(str, iterates))
        return (
            f"{'iterates' if len(iterates) > 1 else 'iterate'} {which} of {self.run}: "
            f"{shown_name(self.algorithm)} on {self.config.model or DEFAULT_MODEL}"
        )

    def sampling_text(self, seed: int) -> str:
        """Says how the responses are drawn."""
        config = self.config
        own = (
            "so the random numbers are those of its verdict"
            if seed == config.seed
            else "so no response was seen before"
        )
        return (
            f"reference and policy: temperature {config.temperature:g}, top_p {config.top_p:g}, "
            f"{f'top_k {config.top_k}, ' if config.top_k else ''}at most {config.max_new_tokens} new tokens, "
            f"seed {seed} (the run's is {config.seed}, {own})"
        )


def new_folder(asked: str, free: Callable[[], Path]) -> Path:
    """Returns the folder of --out, or else the one that is free. Raises: UserError where --out is there."""
    if asked and is_there(Path(asked)):
        raise UserError(f"--out {asked} exists; name a folder that does not.")
    return Path(asked) if asked else free()


def open_run(run: str | Path, flags: EvaluateConfig, ranks: Ranks = ALONE) -> Finished:
    """Reads a run that has iterates, on all ranks. Raises: UserError."""
    check(flags)
    given = {f"--{f.name.replace('_', '-')}": str(getattr(flags, f.name)) for f in fields(flags)}
    if ranks.size > 1:
        ranks.check_alike(program() | given | {"RUN": str(run)})
    run = Path(run)
    check_seen(ranks, run)
    owned, committed = owned_inputs(run), read_committed(run)
    found = iterates(committed, flags.iterate, every=flags.best_feasible)
    config = committed.config
    config = replace(
        config,
        device=flags.device or config.device,
        threads=flags.threads or config.threads,
        audit=(*config.audit, *flags.audit),
        eval_responses=flags.n_responses or config.eval_responses,
    )
    if config.eval_responses < 2 and not flags.profile:
        raise UserError("the run's verdict has 1 response per prompt, and pairs need 2; give --n-responses.")
    check_model_ranks(config.tune, flags.model_ranks)
    ranks = ranks.arranged(flags.model_ranks)
    prepare_process(config.threads, ranks)
    return Finished(
        run=run,
        owned=owned,
        committed=committed,
        config=config,
        iterates=found,
        inputs=read_inputs(config, owned, ranks, now=ranks.first(clock)),
        ranks=ranks,
    )


def iterates(run: Committed, wanted: int, *, every: bool) -> dict[int, list[float]]:
    """Finds the iterate to judge (0: the last one), or every one, with the multipliers it was trained at.

    Raises: UserError when there is none, or not the wanted one.
    """
    run.check_whole()
    there = run.iterates
    if not there:
        raise run.lacks("iterate")
    if wanted and wanted not in there:
        raise UserError(
            f"--iterate {wanted}: {run.folder} has {', '.join(map(str, there))}; give one of these."
        )
    return there if every else {wanted or max(there): there[wanted or max(there)]}


class Phase:
    """Gives sampling what it asks of a stage (`engine.run.store.Stage`), where nothing is saved:
    progress. Ctrl-C stops at once."""

    def __init__(self, display: Display, number: int, name: str) -> None:
        self.name = name
        self.logprob_gap = None  # of its samples, as `engine.stages.sampling.log_gap` gives it
        self._display = display
        display.stage(number, name)

    def log(self, row: Row) -> None:
        """Prints and keeps what `engine.stages.sampling.log_gap` found, the only row of sampling."""
        assert isinstance(row, SampledRow)
        self.logprob_gap = row.logprob_gap
        self._display.line(f"{self.name}: {gap_text(row)}")

    def progress(self, total: int, unit: str, what: str) -> Progress:
        """Opens a progress bar; `unit` is a plural such as "tokens"."""
        return self._display.progress(total, unit, what)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._display.warn(text)

    def log_speed(self, row: SpeedRow) -> None:
        """Speeds are seen while they last, and not kept."""

    def check_stop(self) -> None:
        """Does nothing: Ctrl-C is not held back, so there is nothing to ask."""
