"""The verdict in sentences."""

from engine.constraints.judging import MET
from engine.errors import NotMet
from engine.intervals import improvement_text, interval_text, number
from engine.records import UNIT_NAMES
from engine.verdict.evaluation import Evaluation, Judgement


def sentences(evaluation: Evaluation) -> list[str]:
    """Says the verdict in lines: sample, constraints, reward, audits, KL, endings, length and refusals."""
    e, confidence, units = evaluation, evaluation.confidence, UNIT_NAMES[evaluation.units]
    lines = [
        f"held-out: {e.n_prompts} prompts x {e.n_responses} responses; "
        f"improvements over the reference in {units}"
    ]
    lines += [c.limit.verdict_text(c, confidence) for c in e.constraints]
    lines += overall_sentences(e)
    lines.append(f"reward: {improvement_text(e.reward, confidence)}, in {units}")
    lines += [
        f"audit {name} (never optimised): {improvement_text(x, confidence)}, in {units}"
        for name, x in e.audits
    ]
    cut = "mean log-ratio of policy and reference on samples cut by top-k or top-p, which is no KL"
    lines.append(
        f"{cut if e.truncated else 'KL(policy || reference)'}: {number(e.kl.mean)} nats per response, "
        f"{interval_text(e.kl, confidence)}"
    )
    lines.append(f"finished answers: {_percent(e.finished)} (reference -> policy)")
    lines.append(
        f"mean length: {e.mean_length[0]:.1f} -> {e.mean_length[1]:.1f} tokens (reference -> policy)"
    )
    if e.refusal_harmless is not None:
        refusals = f"{_percent(e.refusal_harmless)} (reference -> policy, told by {e.refusals_by})"
        lines.append(f"refusals on harmless prompts (all not marked delicate): {refusals}")
    return lines


def overall_sentences(e: Evaluation) -> list[str]:
    """Says the word for all constraints, how often looks may err, and which bounds are approximate."""
    if not e.looks:
        return []
    look, J = e.looks[-1], len(e.constraints)
    at = f"look {len(e.looks)} of at most {look.planned}" if look.planned > 1 else "one look"
    lines = [
        f"verdict: {word_text(e)} ({at}, whose one-sided bounds err in {100 * _error(e):.2g} % of cases, so "
        f"that all looks together keep {100 * e.confidence:g} %)"
    ]
    if J > 1:
        lines.append(
            f"the word for each constraint is corrected for there being {J}; the one for all together needs "
            "no correction"
        )
    if rough := ", ".join(c.name for c in e.constraints if not c.exact):
        lines.append(
            f"bounds of {rough} are approximate, as its costs have no known range (--cost-range): they allow "
            "for the spread and the skewness of these responses, and not for harm unlike all of them"
        )
    return lines


def word_text(e: Evaluation) -> str:
    """Says the word for all constraints together in a clause."""
    J = len(e.constraints)
    return f"{'the constraint is' if J == 1 else f'all {J} constraints together are'} {e.word}"


def check_met(e: Evaluation) -> None:
    """Checks what --require-met asks for, once everything is written. Raises: NotMet."""
    if e.word != MET:
        raise NotMet(
            f"--require-met: {word_text(e)}; everything is written: train it further, or judge it on more "
            "prompts."
        )


def look_text(e: Evaluation) -> str:
    """Says what a look has found that another one follows."""
    found = "; ".join(
        f"{c.name} {number(c.judged.mean, sign='+' if c.measured is None else '')}, bounds "
        f"[{number(c.judged.lower)}, {number(c.judged.upper)}], {c.limit.asked_text()}: {c.word}"
        for c in e.constraints
    )
    return f"look {len(e.looks)} at {e.n_prompts} prompts x {e.n_responses} responses: {found}"


def earlier_text(earlier: int) -> str:
    """Says what verdicts before this one leave to it."""
    verdicts = "verdict" if earlier == 1 else "verdicts"
    return (
        f"{earlier} earlier {verdicts} on this policy or on some of these prompts: this one's bounds are "
        "wider, so that all of them together keep the confidence"
    )


def _error(e: Evaluation) -> float:
    return (1 - e.confidence) * e.looks[-1].share


def judgement_sentences(judgement: Judgement) -> list[str]:
    """Adds to `sentences` a line for each slack, the pair orders, the over-refusal, and the `answer`."""
    evaluation, refusal = judgement.evaluation, judgement.over_refusal
    confidence = evaluation.confidence
    lines = sentences(evaluation)
    lines += [c.limit.slack_text(c.slack, confidence) for c in evaluation.constraints]
    for name, order in zip(("reference", "policy"), judgement.pair_order, strict=True):
        if order is not None:
            share = f"{100 * order.mean:.1f} %, {interval_text(order, confidence, digits=1, scale=100)}"
            lines.append(
                f"pairs of {name} responses that the policy's log-ratio orders like {judgement.pairs_like}: "
                f"{share}, {order.n} prompts"
            )
    shares = [
        f"{100 * s.mean:.1f} %, {interval_text(s, confidence, digits=1, scale=100)}"
        for s in (refusal.reference, refusal.policy)
    ]
    change = f"change {number(100 * refusal.change.mean, 1, '+')} points"
    # Where no prompt's share has changed, the interval of the change has no width and says nothing.
    interval = f", {interval_text(refusal.change, confidence, digits=1, scale=100)}"
    change += interval if refusal.change.se > 0 else " on every prompt"
    lines.append(
        f"refusals on {refusal.policy.n} harmless look-alike prompts: "
        f"{shares[0]} -> {shares[1]} (reference -> policy, told by {evaluation.refusals_by}); {change}"
    )
    return [*lines, answer(evaluation)]


def answer(evaluation: Evaluation) -> str:
    """Says whether each constraint is met, not met or not resolved, at this sample size and confidence."""
    e = evaluation
    words = "; ".join(
        f"constraint {c.name} ({c.limit.asked_text()}{f', on {c.limit.on} prompts' if c.limit.on else ''}) "
        f"is {c.word}"
        for c in e.constraints
    )
    sample = f"with {e.n_prompts} prompts x {e.n_responses} responses and {100 * e.confidence:g} % confidence"
    return f"{sample}: {words}"


def _percent(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} % -> {100 * pair[1]:.1f} %"
