"""The record of prompts with their responses that everything after scoring works on."""

from dataclasses import dataclass

from engine.model.packing import Group, LowerStates
from engine.records import Prompts, Rollouts, Sampled, ScaledScores


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts with n responses each, scored in the run's units."""

    prompts: Prompts
    sampled: Sampled  # the responses, with the scorers' own scores
    scores: ScaledScores
    lower: LowerStates | None = None  # states below the adapter, where they were kept

    @property
    def rollouts(self) -> Rollouts:
        """The responses' tokens."""
        return self.sampled.rollouts

    def groups(self, rows: dict[int, list[int]]) -> list[Group]:
        """Returns the responses at `rows` of each prompt, with the prompt once."""
        tokens, length = self.rollouts.tokens, self.rollouts.length
        return [
            Group(self.prompts.token_ids[p], [tokens[r, : int(length[r])].tolist() for r in chosen], chosen)
            for p, chosen in rows.items()
        ]
