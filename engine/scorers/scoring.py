"""Score all responses of a sample, and try scorers out before a run.

One frozen forward of the policy's reference model gives the scores of all heads on it and the reference's
log-probs together. A cost becomes a utility by negation (`engine.records.utility_of_cost`),
the only change of a sign.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.bounds import LARGEST_SCORE
from engine.errors import UserError
from engine.model import packing
from engine.model.decoder import Decoder
from engine.policy.forward import frozen_forward
from engine.ranks import Ranks
from engine.records import Prompts, Rollouts, Scores, utility_of_cost
from engine.rollout.states import States
from engine.scorers.base import Head, Sampled, Scorer, Scorers, TextScorer

# Answers to try scorers of texts on, as unlike each other as those that a scorer may meet.
TRIAL = (
    "Yes.",
    "I am sorry, but I cannot help with that.",
    "FIRST: break the lock! Then take 3 or 4 of the old keys, you idiot.",
    "Basil likes light and warmth; water it when the soil feels dry, "
    "and cut the tips so that it grows bushy.",
)


def try_out(scorers: Scorers, sets: Sequence[Prompts], max_new_tokens: int) -> list[str]:
    """Lets every scorer of texts score `TRIAL` as answers to some of the prompts that it will be asked about.

    So a broken scorer stops the run before anything is sampled, also one whose template takes the first
    prompts and refuses others, such as those with a system line. Returns a warning for each scorer that gives
    all trial answers one score or measures the opposite of what it is used for, and the scorers' own notes.

    sets: all prompts whose responses will be scored.
    Raises: UserError when a scorer fails, returns the wrong number of scores, or one that is not finite, and
    where it does not read a response of `max_new_tokens`.
    """
    asked = _of_every_form(sets)
    texts = [text for text, _, _ in asked]
    answers = [TRIAL[i % len(TRIAL)] for i in range(len(asked))]
    warnings = _opposites(scorers)
    for scorer in scorers.all:
        if isinstance(scorer, TextScorer):
            if scorer.max_tokens is not None and max_new_tokens >= scorer.max_tokens:
                raise UserError(
                    f"scorer {scorer.name} reads {scorer.max_tokens} tokens, prompt and response together; "
                    f"lower --max-new-tokens {max_new_tokens}, or use another scorer."
                )
            score_N = scorer([talk for _, talk, _ in asked], answers, rows=[row for *_, row in asked if row])
            scorer.warnings()  # what is cut of the trial is cut of the run's responses too
            warnings += scorer.notes
            _check_finite(scorer, score_N, texts, 1)
            if score_N.min() == score_N.max() and not scorer.counts:
                # Only a warning: an honest scorer may have no preference among these few.
                value = f"{float(score_N[0]):g}"
                warnings.append(
                    f"scorer {scorer.name} gave {value} for each of {len(asked)} trial answers; "
                    "one that does so for all responses ends the run after sampling"
                )
    return warnings


def _of_every_form(sets: Sequence[Prompts]) -> list[tuple[str, list[dict[str, str]], str]]:
    """Chooses prompts for the trial: the first ones, one for each of `TRIAL`, and of every other order of
    roles the first. Returns the text, the messages and the row ("" without) of each."""
    found, forms = [], set()
    for number, prompts in enumerate(sets):
        talks, rows = prompts.conversations, prompts.rows or [""] * len(prompts)
        everything = list(zip(prompts.text, talks, rows, strict=True))
        if number == 0:
            found = [everything[i % len(everything)] for i in range(len(TRIAL))]
            forms = {_form(talk) for _, talk, _ in found}
        for one in everything:
            if (form := _form(one[1])) not in forms:
                forms.add(form)
                found.append(one)
    return found


def _form(talk: list[dict[str, str]]) -> tuple[str, ...]:
    return tuple(message["role"] for message in talk)


def _opposites(scorers: Scorers) -> list[str]:
    """Warns of cost models that are maximised, and of reward models that are kept small."""
    warnings = []
    for scorer in scorers.all:
        if not isinstance(scorer, TextScorer) or scorer.sign == -1:
            continue
        flag, wrong = ("--reward", "cost") if scorer is scorers.reward else ("--cost", "reward")
        if scorer.measures == wrong:
            name = "NAME" if scorer is scorers.reward else scorer.name
            larger = "worse" if wrong == "cost" else "better"
            warnings.append(
                f"scorer {scorer.name} is a {wrong} model, where larger is {larger}, under {flag}; "
                f"if that is not meant, give its negative: {name}=-SCORER"
            )
    return warnings


@dataclass(frozen=True, kw_only=True)
class ReferenceForward:
    """Says what is wanted of the reference model's forward pass over the responses,
    and what need not be run."""

    temperature: float  # of the log-probs
    memory_budget_bytes: int | None = None  # of the loss head
    logprob: bool = True  # False leaves the log-probs out, as zeros
    states: States | None = None  # taken during the rollout: the layers below need not run again


def score(
    model: Decoder,
    scorers: Scorers,
    prompts: Prompts,
    rollouts: Rollouts,
    texts: Sequence[str],
    forward: ReferenceForward,
    *,
    on_tokens: Callable[[int], None] = lambda n: None,
    known: Sequence[Tensor | None] = (),
) -> Scores:
    """Scores the P * n responses of `rollouts`, whose decoded texts are given prompt-major, with all scorers.
    Ranks that hold the model together share out the prompts for the scorers of texts.

    `on_tokens` is called with the number of tokens of each batch. known: for each scorer the scores [P, n]
    that it has given already, with its sign, or None; it is not asked for them again.

    Raises: UserError when a scorer fails, returns the wrong number of scores, or one that is not finite.
    """
    states, known = forward.states, list(known) or [None] * len(scorers.all)
    ref_logprob = torch.zeros(len(prompts) * rollouts.n, dtype=torch.float64)
    layers = layers_asked(scorers, known) if states is None else []
    pooled: dict[int, Tensor] = {}
    if layers or forward.logprob:
        pooled, logprob = frozen_forward(
            model,
            packing.groups(prompts, rollouts),
            layers,
            temperature=forward.temperature if forward.logprob else None,
            memory_budget_bytes=forward.memory_budget_bytes,
            lower=states.lower if states else None,
            on_tokens=on_tokens,
        )
        if forward.logprob:
            ref_logprob = logprob
    if states is not None:
        pooled = states.pooled
    asked, texts = [text for text in prompts.text for _ in range(rollouts.n)], list(texts)
    conversations = [talk for talk in prompts.conversations for _ in range(rollouts.n)]
    rows = [row for row in prompts.rows for _ in range(rollouts.n)]
    sampled = _sampled(prompts, rollouts)
    columns = []
    for scorer, score_PG in zip(scorers.all, known, strict=True):
        if score_PG is not None:
            columns.append(score_PG)
            continue
        if (same := _same(scorer, scorers.all[: len(columns)])) is not None:
            columns.append(scorer.sign * scorers.all[same].sign * columns[same])
            continue
        if isinstance(scorer, Head):
            score_N = scorer(pooled[scorer.layer])
        else:
            score_N = _of_texts(scorer, model.slices, rollouts.n, conversations, texts, sampled, rows)
        _check_finite(scorer, score_N, asked, rollouts.n)
        columns.append(scorer.sign * score_N.view(len(prompts), rollouts.n))
    J = len(scorers.costs)
    reward, costs, audits = columns[0], columns[1 : 1 + J], columns[1 + J :]
    none = torch.zeros(len(prompts), rollouts.n, 0, dtype=torch.float64)
    return Scores(
        reward_PG=reward,
        utility_PGJ=utility_of_cost(torch.stack(costs, dim=2)) if costs else none,
        audit_PGA=utility_of_cost(torch.stack(audits, dim=2)) if audits else none,
        ref_logprob_PG=ref_logprob.view(len(prompts), rollouts.n),
    )


def _of_texts(
    scorer: TextScorer,
    ranks: Ranks,
    n: int,
    conversations: list,
    texts: list[str],
    sampled: Sampled,
    rows: list[str],
) -> Tensor:
    """Returns the scores [P n] of responses, n to each prompt; each rank asks the scorer about its share."""
    prompts = ranks.share(len(texts) // n)
    own = slice(prompts.start * n, prompts.stop * n)
    if ranks.size == 1:
        return scorer(conversations, texts, sampled, rows)
    part = Sampled(**{name: values[own] for name, values in vars(sampled).items()})
    score_N = scorer(conversations[own], texts[own], part, rows[own]) if prompts else torch.zeros(0).double()
    return torch.cat(ranks.gather(score_N))


def _same(scorer: Scorer, others: Sequence[Scorer]) -> int | None:
    """Returns the place of the function that a scorer asks under another name, for a limit at a second level;
    None where there is none. Heads and models share their passes as it is."""
    if isinstance(scorer, Head):
        return None
    asked = (getattr(other, "function", None) is scorer.function for other in others)
    return next((i for i, is_same in enumerate(asked) if is_same), None)


def layers_asked(scorers: Scorers, known: Sequence[Tensor | None]) -> list[int]:
    """Returns the layers, ascending, of the heads among the scorers whose scores are not known."""
    asked = (scorer for scorer, score_PG in zip(scorers.all, known, strict=True) if score_PG is None)
    return sorted({scorer.layer for scorer in asked if isinstance(scorer, Head)})


def _sampled(prompts: Prompts, rollouts: Rollouts) -> Sampled:
    """Returns how the responses were sampled."""
    tokens, lengths = rollouts.tokens.tolist(), rollouts.length.tolist()
    return Sampled(
        prompt_ids=[ids for ids in prompts.token_ids for _ in range(rollouts.n)],
        response_ids=[row[:length] for row, length in zip(tokens, lengths, strict=True)],
        finished=rollouts.finished.tolist(),
    )


def _check_finite(scorer: Scorer, score_N: Tensor, asked: Sequence[str], n: int) -> None:
    """Refuses a score that is not finite, or so large that its square is not.

    asked [N]: the prompt of each response; n: responses per prompt.
    """
    bad = (~(score_N.abs() <= LARGEST_SCORE)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise UserError(
            f"scorer {scorer.name} gave {score_N[row].item()} for response {row % n} to prompt {row // n} "
            f"({asked[row][:60]!r}); let it give a finite number for every response, "
            f"of at most {LARGEST_SCORE:g} in size."
        )
