"""The run of --samples-of: whether its samples are those of this run, and which scores of them still hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.config import SAMPLING, RunConfig, was_by_preference
from engine.errors import UserError
from engine.records import Scores
from engine.run.committed import Committed, read_committed
from engine.run.contents import read_contents
from engine.run.store import RecordT
from engine.stages.run_inputs import OwnedInputs, owned_inputs

SCORERS = ("reward", "cost", "audit")  # the settings in which the two runs may differ, unlike all of SAMPLING


@dataclass(frozen=True, kw_only=True)
class SharedSamples:
    """The samples of another run."""

    run: Committed
    # For each scorer of this run, reward, costs and audits, its place among those of the other run that have
    # scored these samples; None for one that is not among them.
    places: list[int | None]

    @staticmethod
    def of(config: RunConfig, contents: Mapping[str, Mapping[str, str]]) -> "SharedSamples":
        """Compares the scorers of this run with those of the run that --samples-of names: the same are those
        that are spelled alike and have the same code or weights.

        contents: of this run's scorers, as `engine.scorers.find.content` gives them.
        Raises: UserError where there is no such run.
        """
        run = read_committed(Path(config.samples_of))
        other, theirs = owned_inputs(run.folder), specs(run.config)
        # Of a run that has changed scorers on its way, nothing tells which of them gave a score.
        changed = other.has_changed_scorers
        places: list[int | None] = []
        for spec, (name, content) in zip(specs(config), contents.items(), strict=True):
            place = theirs.index(spec) if spec in theirs and not changed else None
            if place is not None:
                scored_by = other.record.scorers.get("reward" if place == 0 else name, {})
                place = place if scored_by.get("sha256") == content["sha256"] else None
            places.append(place)
        if None in places and run.config.samples:
            raise UserError(
                f"--samples-of {config.samples_of}: its responses are those of --samples "
                f"{run.config.samples}; with other scorers, give that file instead of the run."
            )
        return SharedSamples(run=run, places=places)

    @property
    def is_scored(self) -> bool:
        """Tells whether the samples have the scores of this run's scorers, and no others."""
        return self.places == list(range(len(specs(self.run.config))))

    @property
    def compares_with_reference(self) -> bool:
        """Tells whether the samples came with log-probs that log-ratios may be taken to; of a sweep's samples
        this cannot always be told."""
        contents = self.run.contents
        by_preference = was_by_preference(contents.algorithm, contents.config)
        return by_preference or self.run.config.compares_with_reference

    def load(self, stage: str, cls: type[RecordT]) -> RecordT:
        """Loads the record of a stage. Raises: UserError where the run has none, or it is damaged."""
        try:
            return self.run.load(stage, cls)
        except UserError as error:
            raise UserError(f"--samples-of {self.run.folder}: {error}") from error

    def known(self, scores: Scores) -> list[Tensor | None]:
        """Picks, from the other run's scores of some responses, those [P, G] of each of this run's scorers;
        None for one that has yet to score them."""
        columns = as_given(scores)
        return [None if place is None else columns[place] for place in self.places]


def as_given(scores: Scores) -> list[Tensor]:
    """Returns the scores [P, G] of each scorer as it has given them: utilities are negated costs, and audits
    too."""
    return [scores.reward_PG, *(-scores.utility_PGJ).unbind(2), *(-scores.audit_PGA).unbind(2)]


def specs(config: RunConfig) -> list[str]:
    """Lists what names the scorers of a run, in the order of `engine.scorers.base.Scorers.all`."""
    return [config.reward, *config.cost, *config.audit]


def spelled_alike(
    config: RunConfig, contents: Mapping[str, Mapping[str, str]], other: OwnedInputs
) -> dict[str, Mapping[str, str]]:
    """Returns the contents of those scorers of this run that the run of --samples-of names as it does."""
    reward, *others = specs(read_committed(other.run).config)
    return {
        name: content
        for spec, (name, content) in zip(specs(config), contents.items(), strict=True)
        if (spec == reward if name == "reward" else spec in others)
    }


def check_samples_of(config: RunConfig) -> None:
    """Checks that the samples of --samples-of are those that this run would draw.

    Raises: UserError where the run that it names has others.
    """
    other = read_contents(Path(config.samples_of)).config
    for name in SAMPLING:
        theirs, own = other.get(name, getattr(RunConfig, name)), getattr(config, name)
        if theirs != own and name not in SCORERS:
            raise UserError(
                f"--samples-of {config.samples_of}: it has --{name.replace('_', '-')} {theirs}, "
                f"this run has {own}."
            )
