"""The verdict in sentences."""

from engine.intervals import Estimate, Share
from engine.verdict.evaluation import Constraint, Evaluation, Judgement

UNIT = "within-prompt standard deviations of the reference"


def sentences(evaluation: Evaluation) -> list[str]:
    """The plain verdict, one line each: what was measured, constraints, reward, audits, KL, finished answers, length, refusals."""
    e, level = evaluation, _level(evaluation)
    lines = [f"held-out: {e.n_prompts} prompts x {e.n_responses} responses; improvements over the reference in {UNIT}"]
    lines += [_constraint_line(c, level) for c in e.constraints]
    lines.append(f"reward: {_improvement_text(e.reward, level)}, in {UNIT}")
    lines += [f"audit {name} (never optimised): {_improvement_text(result, level)}, in {UNIT}" for name, result in e.audits]
    lines.append(f"KL(policy || reference): {_number(e.kl.mean)} nats per response, {_interval(e.kl, level)}")
    lines.append(f"finished answers: {_percent(e.finished)} (reference -> policy)")
    lines.append(f"mean length: {e.mean_length[0]:.1f} -> {e.mean_length[1]:.1f} tokens (reference -> policy)")
    if e.refusal_harmless is not None:
        lines.append(f"refusals on harmless prompts (all not marked delicate): {_percent(e.refusal_harmless)} (reference -> policy)")
    return lines


def judgement_sentences(judgement: Judgement) -> list[str]:
    """`sentences`, then slack, pair order and over-refusal, one line each, and at the end the answer in one sentence."""
    evaluation, refusal = judgement.evaluation, judgement.over_refusal
    level = _level(evaluation)
    lines = sentences(evaluation)
    for c in evaluation.constraints:
        what = {"improvement": "improvement - b", "mean": "limit - mean cost", "rate": "limit - rate, %"}[c.kind]
        scale = 100 if c.kind == "rate" else 1
        slack = f"{_number(scale * c.slack.mean, sign='+')}, {_interval(c.slack, level, scale=scale)}"
        lines.append(f"slack {c.name} ({what}): {slack}")
    for name, order in zip(("reference", "policy"), judgement.pair_order, strict=True):
        if order is not None:
            share = f"{100 * order.mean:.1f} %, {_interval(order, level, digits=1, scale=100)}"
            lines.append(
                f"pairs of {name} responses that the policy's log-ratio orders like {judgement.pairs_like}: {share}, {order.n} prompts"
            )
    shares = [f"{100 * s.mean:.1f} %, {_interval(s, level, digits=1, scale=100)}" for s in (refusal.reference, refusal.policy)]
    change = f"change {_number(100 * refusal.change.mean, 1, '+')} points"
    # Where no prompt's share has changed the interval of the change has no width, which says nothing.
    change += f", {_interval(refusal.change, level, digits=1, scale=100)}" if refusal.change.se > 0 else " on every prompt"
    lines.append(f"refusals on {refusal.policy.n} harmless look-alike prompts: {shares[0]} -> {shares[1]} (reference -> policy); {change}")
    return [*lines, answer(evaluation)]


def answer(evaluation: Evaluation) -> str:
    """The plain sentence: each constraint met, not met or not resolved, at this sample size and confidence."""
    e = evaluation
    asked = {"improvement": "b {:g}", "mean": "mean cost at most {:g}", "rate": "rate at most {:g} %"}
    words = "; ".join(
        f"constraint {c.name} ({asked[c.kind].format(c.threshold * (100 if c.kind == 'rate' else 1))}"
        f"{f', on {c.on} prompts' if c.on else ''}) is {c.word}"
        for c in e.constraints
    )
    return f"with {e.n_prompts} prompts x {e.n_responses} responses and {_level(e)} confidence: {words}"


def _constraint_line(c: Constraint, level: str) -> str:
    """`constraint NAME: WORD (details)`, with as many digits as the comparison needs to be true as printed."""
    scale, percent, shown = (100, " %", c.measured) if c.kind == "rate" else (1, "", c.measured or c.estimate)
    threshold, ends = scale * c.threshold, [scale * x for x in (shown.lower, shown.upper)]
    digits = 2
    while digits < 8 and any((round(x, digits) < round(threshold, digits)) != (x < threshold) for x in ends if x != threshold):
        digits += 1
    while digits < 8 and abs(round(threshold, digits) - threshold) > 1e-9:
        digits += 1
    lower, upper, b = (_number(x, digits) for x in (*ends, threshold))
    on = f"on {c.estimate.n} {c.on} prompts: " if c.on else ""
    between = f"lies between the one-sided bounds {lower} and {upper}"
    if c.measured is None:
        reason = {
            "met": f"one-sided lower bound {lower} >= b {b}", "not met": f"one-sided upper bound {upper} < b {b}",
            "not resolved": f"b {b} {between}",
        }[c.word]  # fmt: skip
        return f"constraint {c.name}: {c.word} ({on}{_improvement_text(c.estimate, level)}, {reason}, aimed at {_number(c.aim)})"
    reason = {
        "met": f"one-sided upper bound {upper} <= {b}{percent}", "not met": f"one-sided lower bound {lower} > {b}{percent}",
        "not resolved": f"the limit {b}{percent} {between}",
    }[c.word]  # fmt: skip
    values = f"{_number(scale * shown.mean)}{percent}, {_interval(shown, level, scale=scale)}"
    return (
        f"constraint {c.name}: {c.word} ({on}{'rate' if c.kind == 'rate' else 'mean cost'} {values}, {reason}, aimed at "
        f"{_number(scale * c.aim)}{percent}, reference {_number(scale * c.reference)}{percent}; {_improvement_text(c.estimate, level)})"
    )


def _improvement_text(result: Estimate, level: str) -> str:
    return f"improvement {_number(result.mean, sign='+')}, {_interval(result, level)}"


def _interval(result: Estimate | Share, level: str, digits: int = 2, scale: float = 1) -> str:
    return f"{level} [{_number(scale * result.low, digits)}, {_number(scale * result.high, digits)}]"


def _level(evaluation: Evaluation) -> str:
    return f"{100 * evaluation.confidence:g} %"


def _number(value: float, digits: int = 2, sign: str = "") -> str:
    """Fixed digits, never "-0.00"."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _percent(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} % -> {100 * pair[1]:.1f} %"
