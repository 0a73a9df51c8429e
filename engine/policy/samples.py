"""The record of prompts with their responses: sampling returns it, stages keep it, updates learn from it."""

from dataclasses import dataclass

from torch import Tensor

from engine.model.packing import Group, LowerStates
from engine.records import Prompts, Rollouts, ScaledScores, Scores


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts with n responses each, and what the scorers say of them."""

    prompts: Prompts
    rollouts: Rollouts
    texts: list[str]  # [R], prompt-major
    scores: Scores  # in the scorers' own units
    kl_PG: Tensor  # log pi - log pi_ref of each response, nats; 0 for the reference
    scaled: ScaledScores | None = None  # in the run's units, once these are fixed
    lower: LowerStates | None = None  # states below the adapter, where they were kept in memory

    def groups(self, rows: dict[int, list[int]]) -> list[Group]:
        """Returns the responses at `rows` of each prompt, with the prompt once."""
        tokens, length = self.rollouts.tokens, self.rollouts.length
        return [
            Group(self.prompts.token_ids[p], [tokens[r, : int(length[r])].tolist() for r in chosen], chosen)
            for p, chosen in rows.items()
        ]
