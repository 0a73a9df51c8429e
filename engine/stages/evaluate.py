"""Judges an iterate of a run on held-out prompts, with fresh responses, for `engine.evaluate`.

Reference and policy answer the same prompts with the run's own sampling settings; units and thresholds are
those that the run fixed. To the run's verdict this adds the slack, scorers that the run did not know, how
often the policy orders pairs as the Lagrangian does, and refusals on harmless prompts that look dangerous.
Nothing is saved on the way: the folder of the results appears whole at the end. RUN/judged.jsonl keeps which
verdicts there were, so that further ones on the same policy, or on prompts that have judged before, share the
error that all of them may have (`engine.run.judged`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine import constraints, dual, keys
from engine.config import EvaluateConfig, RunConfig, was_by_preference
from engine.constraints import Limit
from engine.data.prompts import assert_disjoint, lookalike_prompts, overlap
from engine.data.reading import EVERY_ROW
from engine.errors import UserError
from engine.files import whole_folder, write_json
from engine.looks import CONFIDENCE, attempt_share
from engine.model import packing
from engine.policy.samples import Samples
from engine.policy.weights import Weights
from engine.ranks import ALONE, Ranks
from engine.records import Prompts, Units
from engine.report import certificate
from engine.run import judged
from engine.run.display import Display
from engine.run.folder import RunFolder
from engine.run.rows import DualRow, ReferenceRow, VerdictRow
from engine.scorers.base import Scorers
from engine.scorers.scoring import try_out
from engine.stages import preference
from engine.stages.finished import Finished, Phase, new_folder, open_run
from engine.stages.inputs import read_prompts, rules_of
from engine.stages.job import Subject, heldout_prompts, judged_prompts, training_prompts
from engine.stages.reference import ByScorers, Scoring, is_counted_alone, units_of
from engine.stages.refusals import sampled_refusals
from engine.stages.sampling import logprobs, naming, sample
from engine.stages.verdict import Bar, judge, what_was_made, write_heldout
from engine.verdict.evaluation import Judgement, pair_order
from engine.verdict.refusals import over_refusal
from engine.verdict.sentences import earlier_text, judgement_sentences


@dataclass(frozen=True, kw_only=True)
class Question:
    """Holds what is to be judged, read and checked; no weights are loaded yet."""

    opened: Finished
    config: RunConfig  # that of `opened`, with as many rows as the memory holds
    selection: Prompts | None  # what the iterate is chosen on
    by_preference: bool  # scores are log-ratios of policies that the run aligned to preferences
    units: Units  # of the run's scorers; further audits have none yet
    limits: list[Limit]
    aimed: list[float]  # in each constraint's own measure
    trained_on: Prompts
    scorers: Scorers
    scorer_contents: dict[str, dict[str, str]]
    prompts: Prompts
    pool: int  # prompts that these are a subset of
    shared: str  # says which prompts are training prompts too; "" where none is
    lookalikes: Prompts
    safety_alone: bool  # plain DPO on g: pairs are to have the order of g
    attempt: judged.Attempt
    earlier: int  # verdicts before this one on the same policy, or on some of these prompts
    notes: list[str]  # says what has changed since the run began, and what was left out of --prompts
    fewer_rows: bool  # memory is short, so that fewer responses are decoded side by side than in the run


def ask(run: str | Path, flags: EvaluateConfig, ranks: Ranks = ALONE) -> Question:
    """Reads the run and checks everything that can be checked without compute.

    Raises: UserError.
    """
    opened = open_run(run, flags, ranks)
    committed, config, inputs = opened.committed, opened.config, opened.inputs
    algorithm, values = opened.algorithm, committed.contents.config
    pool, said = inputs.heldout, []
    rules = rules_of(config, inputs.folder, flags.n_prompts or None)
    if flags.prompts:
        pool, said = read_prompts(flags.prompts, inputs.tokenizer, inputs.limits, rules)
    n = min(flags.n_prompts or (len(pool) if flags.prompts else opened.looked_at.prompts), len(pool))
    if n < 2:
        raise UserError(f"{n} prompt(s): a standard error needs at least 2; give more with --prompts.")
    prompts = heldout_prompts(pool, n, config.seed, shipped=config.judged_on_shipped and not flags.prompts)
    common, shared = overlap(prompts, inputs.train), ""
    if common:
        shared = (
            f"{len(common)} of {n} prompts are among the run's training prompts, the first is "
            f"{prompts.text[common[0]][:60]!r}"
        )
        if not flags.allow_overlap:
            raise UserError(f"{shared}; give others with --prompts, or go on with --allow-overlap.")
    own = judged_prompts(config, inputs.heldout, opened.looked_at.prompts)
    selection = own if flags.best_feasible else None
    if selection:
        assert_disjoint(selection, prompts, "prompt on which the iterate is chosen")
    every = replace(EVERY_ROW, rows=rules.rows)
    lookalikes, _ = read_prompts(lookalike_prompts(), inputs.tokenizer, inputs.limits, every)
    groups = [group for group in (prompts, lookalikes, selection) if group]
    rows = opened.rows(groups, max(len(prompts), len(selection) if selection else 0))
    fewer, config = rows < config.rollout_rows, replace(config, rollout_rows=rows)
    contents = opened.scorer_contents()
    opened.check_alike(contents, groups)
    scorers, changed = opened.scorers(contents, accept_changes=flags.accept_changes)
    reference = committed.one(ReferenceRow)
    limits = constraints.limits(config, [s.name for s in scorers.costs], reference.worst_above)
    constraints.check_prompts(
        limits, {"prompts": prompts} | ({"held-out prompts": selection} if selection else {})
    )
    units = units_of(reference, limits, config.units)
    by_preference = was_by_preference(algorithm, values)
    # Aims of log-ratios, which are improvements, were fixed with their units.
    aimed = committed.one(DualRow).aim if by_preference else reference.aimed
    # Which iterate is the best feasible one, the selection tells; it is one policy more that these judge.
    iterate = -1 if selection else next(iter(opened.iterates))
    attempt = judged.Attempt.of(committed.contents, iterate, prompts, flags.seed)
    return Question(
        opened=opened,
        config=config,
        selection=selection,
        by_preference=by_preference,
        units=units,
        limits=limits,
        aimed=aimed,
        trained_on=training_prompts(inputs.train, config.n_prompts, config.seed),
        scorers=scorers,
        scorer_contents=contents,
        prompts=prompts,
        pool=len(pool),
        shared=shared,
        lookalikes=lookalikes,
        safety_alone=algorithm == "dpo" and values.get("objective") == "safety",
        attempt=attempt,
        earlier=judged.earlier(RunFolder(opened.run), attempt, _own_verdict(opened)),
        notes=[*inputs.notes, *changed, *said],
        fewer_rows=fewer,
    )


def _own_verdict(opened: Finished) -> judged.Attempt | None:
    """Returns the run's own verdict, as its stages know of it; None before there was one."""
    committed, config, heldout = opened.committed, opened.committed.config, opened.inputs.heldout
    if not committed.rows(VerdictRow):
        return None
    pool = judged_prompts(config, heldout, config.looks(len(heldout))[-1].prompts)
    return judged.Attempt.of(committed.contents, max(committed.iterates), pool, config.seed)


def run_evaluation(run: str | Path, flags: EvaluateConfig, ranks: Ranks = ALONE) -> tuple[Judgement, Path]:
    """Judges an iterate of `run` and writes evaluation.json and heldout.jsonl;
    returns what was found, and their folder. Of several ranks rank 0 alone writes.

    Raises: UserError, before any compute unless a scorer fails.
    """
    out = ranks.first(lambda: new_folder(flags.out, RunFolder(Path(run)).next_evaluation))
    q = ask(run, flags, ranks)
    config, prompts, n = q.config, q.prompts, q.config.eval_responses
    first = 1 + len(q.opened.iterates) if q.selection else 0
    display = Display(n_stages=first + 4, silent=not ranks.is_first)
    for line in _opening(q, flags):
        display.line(line)
    asked = [group for group in (prompts, q.selection) if group]
    for warning in [*q.notes, *try_out(q.scorers, asked, config.max_new_tokens)]:
        display.warn(warning)
    if q.shared:
        display.warn(f"{q.shared}: what follows may be better than on new prompts")

    def next_free() -> Path:
        """Takes the next name: another evaluation, which began later, has ended first."""
        nonlocal out
        out = RunFolder(q.opened.run).next_evaluation()
        return out

    whole = whole_folder(out, otherwise=None if flags.out else next_free)
    with ranks.only_first(whole) as folder, display:
        subject = q.opened.subject(config, q.scorers, flags.seed)
        tried = _try_all(q, subject, display) if q.selection else []
        iterate = best_feasible(tried) if tried else next(iter(q.opened.iterates))
        adapter = q.opened.policy(subject.model, iterate)
        # The same keys as the run's own verdict: with the run's seed this draws exactly its responses.
        phase = Phase(display, first + 1, "heldout/reference")
        before = sample(subject, phase, prompts, None, n=n, purpose=keys.HELDOUT_REFERENCE)
        gaps = {"reference": phase.logprob_gap}
        units = _with_new_audits(q, before, display)
        phase = Phase(display, first + 2, "heldout/policy")
        after = sample(subject, phase, prompts, adapter, n=n, purpose=keys.HELDOUT_POLICY)
        gaps["policy"] = phase.logprob_gap
        moved_PG = policy_logprob(subject, phase, before, adapter) - before.scores.ref_logprob_PG
        scoring = _scoring(q, subject, units)
        before, after = (replace(side, scaled=scoring(phase, side)) for side in (before, after))
        phase = Phase(display, first + 3, "lookalike/reference")
        told = {"n": n, "purpose": keys.LOOKALIKE_REFERENCE}
        refused_before = sampled_refusals(subject, phase, q.lookalikes, None, **told)
        phase = Phase(display, first + 4, "lookalike/policy")
        told = {"n": n, "purpose": keys.LOOKALIKE_POLICY}
        refused_after = sampled_refusals(subject, phase, q.lookalikes, adapter, **told)

        sides = Answered(
            before=before,
            after=after,
            moved_PG=moved_PG,
            refused=(refused_before, refused_after),
            iterate=iterate,
            tried=tried,
            scoring=scoring,
            gaps=gaps,
        )
        judgement = ranks.first(lambda: _conclude(q, sides, adapter, flags, folder, display))
    written = RunFolder(out)
    display.line(f"written: {written.evaluation} and {written.heldout}")
    display.line(f"certificate: {written.certificate} and {written.certificate_html}")
    return judgement, out


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What policy and reference have answered, scored."""

    before: Samples
    after: Samples
    moved_PG: Tensor  # log-ratios of the reference's responses, nats
    refused: tuple[list[bool], list[bool]]  # answers to the look-alikes, the reference's first
    iterate: int
    tried: list[dict]  # see `_try_all`
    scoring: Scoring
    gaps: dict


def _conclude(
    q: Question, a: Answered, adapter: Weights, flags: EvaluateConfig, folder: Path, display: Display
) -> Judgement:
    """Judges the answers; writes and says what is found."""
    config, prompts, before, after = q.config, q.prompts, a.before, a.after
    lam = q.opened.iterates[a.iterate]
    lam_J = torch.tensor(lam, dtype=torch.float64)
    log_ratios = ((before, a.moved_PG), (after, after.kl_PG))

    def wanted(s: Samples) -> Tensor:
        weight_PJ = constraints.weights(q.limits, prompts, q.trained_on)
        utility_PG = (s.scaled.utility_PGJ * weight_PJ[:, None]) @ lam_J
        return utility_PG if q.safety_alone else s.scaled.reward_PG + utility_PG

    # Another evaluation may have ended meanwhile.
    earlier = judged.earlier(RunFolder(q.opened.run), q.attempt, _own_verdict(q.opened))
    try:
        judged.begin(RunFolder(q.opened.run), q.attempt, earlier)
    except UserError as error:
        display.warn(f"{error}; this verdict is not on record")
    judgement = Judgement(
        evaluation=judge(before, after, _bar(q, a.scoring, flags.confidence, attempt_share(earlier))),
        pair_order=tuple(pair_order(x_PG, wanted(s), flags.confidence) for s, x_PG in log_ratios),
        over_refusal=over_refusal(*a.refused, len(q.lookalikes), flags.confidence),
        pairs_like="g" if q.safety_alone else "r + lambda g",
    )
    write_heldout(RunFolder(folder).heldout, before, after)
    settings = {
        f: getattr(config, f)
        for f in ("temperature", "top_p", "top_k", "max_new_tokens", "reward", "cost", "audit")
    }
    settings |= {
        "iterate": a.iterate,
        "lam": lam,
        "selection": a.tried,
        "seed": flags.seed,
        "units": asdict(a.scoring.units),
        "overlap": q.shared,
    }
    write_json(
        RunFolder(folder).evaluation, {**judgement.as_dict(), "logprob_gap": a.gaps, "settings": settings}
    )
    certified = certificate.certificate(
        what_was_made(q.opened.owned, a.iterate, q.opened.tensors(adapter, a.iterate), q.scorer_contents),
        certificate.Judging(
            evaluation=judgement.evaluation,
            prompts=prompts,
            seed=flags.seed,
            earlier=earlier,
            over_refusal=judgement.over_refusal,
            shared=q.shared,
            chosen_on=len(q.selection) if q.selection else 0,
        ),
    )
    certificate.write(folder, certified)
    for line in judgement_sentences(judgement):
        display.line(line)
    return judgement


def _try_all(q: Question, subject: Subject, display: Display) -> list[dict]:
    """Judges every iterate on the selection prompts: returns rows of iterate, lam, reward and room
    (improvement - what is required) of each constraint."""
    n, rows = q.config.eval_responses, []
    # Further audits have no unit here, and are not needed to choose.
    further = len(q.scorers.audits) - len(q.units.audit_A)
    scoring = _scoring(q, subject, replace(q.units, audit_A=[*q.units.audit_A, *[1.0] * further]))

    def tried(phase: Phase, adapter: Weights | None, purpose: int) -> Samples:
        samples = sample(subject, phase, q.selection, adapter, n=n, purpose=purpose)
        return replace(samples, scaled=scoring(phase, samples))

    before = tried(Phase(display, 1, "selection/reference"), None, keys.SELECTION_REFERENCE)
    for number, (iterate, lam) in enumerate(q.opened.iterates.items(), 2):
        adapter = q.opened.policy(subject.model, iterate)
        after = tried(Phase(display, number, f"selection/{iterate}"), adapter, keys.selection(number))
        e = subject.ranks.first(lambda: judge(before, after, _bar(q, scoring)))  # noqa: B023, called at once
        room = [c.estimate.mean - c.required for c in e.constraints]
        rows.append({"iterate": iterate, "lam": lam, "reward": e.reward.mean, "room": room})
        display.line(
            f"iterate {iterate}: reward {e.reward.mean:+.2f}, "
            + ", ".join(
                f"{c.name} {x:+.2f} beyond what is required" for c, x in zip(e.constraints, room, strict=True)
            )
        )
    chosen = best_feasible(rows)
    met = sum(min(row["room"]) >= 0 for row in rows)
    display.line(
        f"iterate {chosen} is judged: "
        + (
            f"the most reward of the {met} that meet every constraint"
            if met
            else "none meets every constraint, and it misses least"
        )
        + f" on {len(q.selection)} held-out prompts; what follows is on others"
    )
    return rows


def _scoring(q: Question, subject: Subject, units: Units) -> Scoring:
    """Returns what the run scored by. units: of its scorers."""
    if q.by_preference:
        return preference.restored(q.opened.committed, q.config, subject, units)
    return ByScorers(units=units, audit_names=[s.name for s in q.scorers.audits])


def _bar(q: Question, scoring: Scoring, confidence: float = CONFIDENCE, share: float = 1.0) -> Bar:
    return Bar(
        limits=q.limits,
        aimed=q.aimed,
        units=scoring.units,
        counted_in=q.config.units,
        audit_names=scoring.audit_names,
        confidence=confidence,
        share=share,
        truncated=q.config.truncated,
        scorers=q.scorers,
    )


def best_feasible(rows: list[dict]) -> int:
    """Chooses the iterate with the most reward among those with room >= 0 in every constraint; where there is
    none, with the most room."""
    feasible = [row for row in rows if min(row["room"]) >= 0]
    best = (
        max(feasible, key=lambda row: row["reward"])
        if feasible
        else max(rows, key=lambda row: min(row["room"]))
    )
    return best["iterate"]


def policy_logprob(subject: Subject, phase: Phase, samples: Samples, adapter: Weights) -> Tensor:
    """Returns log pi of given responses under the policy `adapter`, float64 [P, G], nats."""
    own = sum(g.tokens for g in packing.groups(samples.prompts, samples.rollouts)) // subject.ranks.shares
    with naming(phase), phase.progress(own, "tokens", "pair order") as made:
        return logprobs(subject, samples.prompts, samples.rollouts, adapter, made.advance)


def _opening(q: Question, flags: EvaluateConfig) -> list[str]:
    """Says what is judged, and how the responses are drawn."""
    config, inputs, iterates = q.config, q.opened.inputs, list(q.opened.iterates)
    lam = ", ".join(f"{x:.3f}" for x in q.opened.iterates[iterates[-1]])
    return [
        f"{q.opened.title(iterates)} ({inputs.dtype}, {inputs.device}), "
        f"{'the last one ' if q.selection else ''}trained at lambda {lam}",
        f"prompts: {len(q.prompts)} of {q.pool} in {flags.prompts or 'the held-out set of the run'}, "
        f"and {len(q.lookalikes)} harmless look-alikes of dangerous ones",
        q.opened.sampling_text(flags.seed),
        *([earlier_text(q.earlier)] if q.earlier else []),
        *(
            [f"memory is short, so {config.rollout_rows} responses are decoded side by side"]
            if q.fewer_rows
            else []
        ),
    ]


def _with_new_audits(q: Question, before: Samples, display: Display) -> Units:
    """Adds units of audits that the run did not know to the run's units: measured on the reference's
    responses, unless the run counts in the scorers' own."""
    if q.config.units == "raw":
        return replace(q.units, audit_A=[1.0] * len(q.scorers.audits))
    measured = []
    for a in range(len(q.units.audit_A), len(q.scorers.audits)):
        scorer, audit_PG = q.scorers.audits[a], before.scores.audit_PGA[..., a]
        if is_counted_alone(audit_PG, scorer):
            measured.append(1.0)
            unit = "all of the reference's responses to each prompt have the same, so it counts in its own"
        else:
            measured.append(dual.within_deviation(audit_PG, f"scorer {scorer.name}"))
            unit = (
                "the within-prompt standard deviation of the reference's responses here is "
                f"{measured[-1]:.3g} of the scorer's units"
            )
        display.line(f"audit {scorer.name}: the run fixed no unit for it; {unit}")
    return replace(q.units, audit_A=[*q.units.audit_A, *measured])
