"""The record of prompts with their responses: sampling returns it, stages keep it, updates learn from it."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
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

    def and_more(self, more: "Samples", *, same_prompts: bool) -> "Samples":
        """Returns these samples with others: further responses to the same prompts, or to other prompts with
        as many responses each. States that were kept are left out."""
        P, Q, dim = len(self.prompts), len(more.prompts), int(same_prompts)

        def rows(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat((a.unflatten(0, (P, -1)), b.unflatten(0, (Q, -1))), dim).flatten(0, 1)

        def each(cls: type, a: object, b: object, cat: Callable[[Tensor, Tensor], Tensor]) -> dict:
            tensors = (f.name for f in fields(cls) if isinstance(getattr(a, f.name), Tensor))
            return {name: cat(getattr(a, name), getattr(b, name)) for name in tensors}

        def by_prompt(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat((a, b), dim)

        n, m = self.rollouts.n, more.rollouts.n
        assert P == Q if same_prompts else n == m, (P, Q, n, m)
        texts = self.texts + more.texts
        if same_prompts:
            texts = [
                text
                for p in range(P)
                for text in self.texts[p * n : (p + 1) * n] + more.texts[p * m : (p + 1) * m]
            ]
        return Samples(
            prompts=self.prompts if same_prompts else self.prompts.and_more(more.prompts),
            rollouts=Rollouts(
                n=n + m if same_prompts else n, **each(Rollouts, self.rollouts, more.rollouts, rows)
            ),
            texts=texts,
            scores=Scores(**each(Scores, self.scores, more.scores, by_prompt)),
            kl_PG=by_prompt(self.kl_PG, more.kl_PG),
            scaled=None
            if self.scaled is None or more.scaled is None
            else ScaledScores(**each(ScaledScores, self.scaled, more.scaled, by_prompt)),
        )

    def groups(self, rows: dict[int, list[int]]) -> list[Group]:
        """Returns the responses at `rows` of each prompt, with the prompt once."""
        tokens, length = self.rollouts.tokens, self.rollouts.length
        return [
            Group(self.prompts.token_ids[p], [tokens[r, : int(length[r])].tolist() for r in chosen], chosen)
            for p, chosen in rows.items()
        ]
