"""`python -m engine.evaluate RUN --profile safety`: judge an iterate on sets of safe and unsafe prompts.

Reference and policy answer the prompts of each set with the run's sampling settings; the run's scorers say
which responses are safe and which are better. Prompts that the run trained on are left out. The folder of the
results appears whole at the end.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine import keys
from engine.config import EvaluateConfig, RunConfig
from engine.constraints import unsafe_above
from engine.data.profiles import Profile, PromptSet, profile_of
from engine.data.prompts import overlap
from engine.data.reading import STRICT_REFUSES
from engine.data.tables import NotFound
from engine.errors import UserError
from engine.files import whole_folder, write_json, write_whole
from engine.policy.samples import Samples
from engine.policy.weights import Weights
from engine.ranks import ALONE, Ranks
from engine.records import Prompts
from engine.report import profile_page
from engine.run.display import Display
from engine.run.folder import RunFolder
from engine.scorers.base import Scorers
from engine.scorers.built_in import teller_of_refusals
from engine.scorers.scoring import try_out
from engine.stages.finished import Finished, Phase, new_folder, open_run
from engine.stages.inputs import read_prompts, rules_of
from engine.stages.job import Subject, heldout_prompts
from engine.stages.refusals import refused
from engine.stages.sampling import sample
from engine.verdict.profile import Answers, Scales, SetVerdict, judge_set, table_lines
from engine.verdict.refusals import FIRST_WORDS, SCORER, is_refusal


@dataclass(frozen=True, kw_only=True)
class ReadSet:
    """A set of a profile, read: its prompts have the kinds "safe", "unsafe" and ""."""

    set: PromptSet
    prompts: Prompts
    trained_on: int  # prompts that the run trained on; they are left out, unless --allow-overlap keeps them
    said: list[str]  # what rows were read as, and which were left out

    def lines(self) -> list[str]:
        """Says what is asked."""
        kinds = self.prompts.kind
        counts = [f"{kinds.count(kind)} {kind}" for kind in ("safe", "unsafe") if kind in kinds]
        unmarked = kinds.count("")
        counts += [f"{unmarked} not marked as safe or unsafe"] if unmarked else []
        return [*self.said, f"{self.set.name}: {len(kinds)} prompts ({', '.join(counts)})"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a profile asks of a run, read and checked; no weights are loaded yet."""

    opened: Finished
    config: RunConfig  # that of `opened`, with as many rows as the memory holds
    scorers: Scorers
    profile: Profile
    sets: list[ReadSet]
    left_out: list[str]  # a line for each set that cannot be judged: why, and what to put where
    notes: list[str]  # says what has changed since the run began

    @property
    def iterate(self) -> int:
        """The iterate that is judged."""
        return next(iter(self.opened.iterates))

    @property
    def refusals_by(self) -> str:
        """What tells refusals."""
        return FIRST_WORDS if teller_of_refusals(self.scorers) is None else SCORER

    @property
    def scales(self) -> Scales:
        """What the scores are called, and which costs are safe."""
        return Scales(
            reward=self.scorers.reward.name,
            costs=[scorer.name for scorer in self.scorers.costs],
            safe_at_most=unsafe_above(self.config),
            audits=[scorer.name for scorer in self.scorers.audits],
        )


def ask(run: str | Path, flags: EvaluateConfig, ranks: Ranks = ALONE) -> Asked:
    """Reads the run and the sets of the profile, and checks everything that can be checked without compute.

    Raises: UserError, also where none of the sets can be judged.
    """
    profile = profile_of(flags.profile)
    opened = open_run(run, flags, ranks)
    sets, left_out = [], []
    for prompt_set in profile.sets:
        try:
            sets.append(_read_set(opened, prompt_set, flags))
        except _Unjudged as error:
            left_out.append(str(error))
    if not sets:
        raise UserError(f"--profile {flags.profile}: none of its sets can be judged: {' '.join(left_out)}")
    groups = [read.prompts for read in sets]
    rows = opened.rows(groups, max(map(len, groups)))
    contents = opened.scorer_contents()
    opened.check_alike(contents, groups)
    scorers, changed = opened.scorers(contents, accept_changes=flags.accept_changes)
    return Asked(
        opened=opened,
        config=replace(opened.config, rollout_rows=rows),
        scorers=scorers,
        profile=profile,
        sets=sets,
        left_out=left_out,
        notes=[*opened.inputs.notes, *changed],
    )


class _Unjudged(Exception):
    """A set that cannot be judged, in a line."""


def _read_set(opened: Finished, prompt_set: PromptSet, flags: EvaluateConfig) -> ReadSet:
    """Reads a set, without the prompts that the run trained on.

    Raises: UserError for a set that is there and cannot be read; _Unjudged for another one.
    """
    name, config, inputs = prompt_set.name, opened.config, opened.inputs
    rules = replace(
        rules_of(config, inputs.folder, flags.n_prompts or None),
        prompt_column=prompt_set.prompt,
        response_columns=(),
        kind_of=prompt_set.kind_of,
        strict=False,  # published sets repeat prompts
    )
    try:
        pool, said = read_prompts(prompt_set.source, inputs.tokenizer, inputs.limits, rules)
    except NotFound as error:
        folder = prompt_set.source.partition(":")[0]
        if not prompt_set.files:
            raise _Unjudged(f"{name} is left out: {error}") from error
        raise _Unjudged(
            f"{name} is left out: put {prompt_set.files} into a folder {folder} under the working directory, "
            f"or have the hub within reach ({error})"
        ) from error
    said = [line.removesuffix(STRICT_REFUSES) for line in said]
    if prompt_set.label and not any(pool.kind):
        values = ", ".join((*prompt_set.safe, *prompt_set.unsafe))
        raise UserError(
            f"{prompt_set.source}: no value of the column {prompt_set.label!r} is one of {values}, by which "
            f"the set {name} tells safe prompts from unsafe ones; correct these."
        )
    common = overlap(pool, inputs.train)
    if common and not flags.allow_overlap:
        pool = pool.select([i for i in range(len(pool)) if i not in set(common)])
        said.append(f"{name}: {len(common)} prompts are training prompts of the run and were left out")
    n = min(flags.n_prompts or len(pool), len(pool))
    if n < 2:
        raise _Unjudged(f"{name} is left out: {n} prompt(s), and a standard error needs at least 2.")
    prompts = heldout_prompts(pool, n, config.seed) if n < len(pool) else pool
    return ReadSet(
        set=prompt_set,
        prompts=prompts,
        trained_on=len(common),
        said=said,
    )


def run_profile(
    run: str | Path, flags: EvaluateConfig, ranks: Ranks = ALONE
) -> tuple[list[SetVerdict], Path]:
    """Judges an iterate of `run` on the sets of a profile; writes profile.json, responses.jsonl, profile.png
    and profile.html. Returns what was found, and their folder. Of several ranks rank 0 alone writes.

    Raises: UserError, before any compute unless a scorer fails.
    """
    out = ranks.first(lambda: new_folder(flags.out, RunFolder(Path(run)).next_profile))
    q = ask(run, flags, ranks)
    display = Display(n_stages=2 * len(q.sets), silent=not ranks.is_first)
    opening = _opening(q, flags)
    for line in opening:
        display.line(line)
    sets = [read.prompts for read in q.sets]
    warnings = try_out(q.scorers, sets, q.config.max_new_tokens)
    for warning in [*q.notes, *q.left_out, *warnings, *_overlaps(q, flags)]:
        display.warn(warning)

    def next_free() -> Path:
        """Takes the next name: another evaluation, which began later, has ended first."""
        nonlocal out
        out = RunFolder(q.opened.run).next_profile()
        return out

    whole = whole_folder(out, otherwise=None if flags.out else next_free)
    with ranks.only_first(whole) as folder, display:
        subject = q.opened.subject(q.config, q.scorers, flags.seed)
        adapter = q.opened.policy(subject.model, q.iterate)
        verdicts, rows, gaps = [], [], {}
        for number, read in enumerate(q.sets):
            before, after, gaps[read.set.name] = _answered(q, subject, display, read, number, adapter)
            sides = [_answers(side, q.scorers) for side in (before, after)]
            verdicts.append(judge_set(read.set.name, read.prompts.kind, *sides, q.scales, flags.confidence))
            rows += _rows(read, before, after, sides)

        def write() -> None:
            _write(folder, q, flags, verdicts, gaps)
            write_whole(folder / "responses.jsonl", "".join(f"{row}\n" for row in rows).encode())

        ranks.first(write)
        for line in table_lines(verdicts):
            display.line(line)
    display.line(f"written: {out / 'profile.html'}, profile.png, profile.json and responses.jsonl")
    return verdicts, out


def _answered(
    q: Asked, subject: Subject, display: Display, read: ReadSet, number: int, adapter: Weights
) -> tuple[Samples, Samples, dict]:
    """Samples both sides' responses to the prompts of a set; returns how exact the sampler was too."""
    found, gaps = [], {}
    sides = ((keys.PROFILE_REFERENCE, None), (keys.PROFILE_POLICY, adapter))
    for i, (purpose, weights) in enumerate(sides):
        side = "reference" if weights is None else "policy"
        phase = Phase(display, 2 * number + i + 1, f"{read.set.name}/{side}")
        n = q.config.eval_responses
        found.append(sample(subject, phase, read.prompts, weights, n=n, purpose=purpose))
        gaps[side] = phase.logprob_gap
    return *found, gaps


def _answers(side: Samples, scorers: Scorers) -> Answers:
    told = refused(scorers, side.scores)
    return Answers(
        scores=side.scores, refused=[is_refusal(text) for text in side.texts] if told is None else told
    )


def _opening(q: Asked, flags: EvaluateConfig) -> list[str]:
    """Says what is judged, on what, and how the responses are drawn."""
    inputs, scales = q.opened.inputs, q.scales
    lam = ", ".join(f"{x:.3f}" for x in q.opened.iterates[q.iterate])
    safe = ", ".join(
        f"{cost} at most {most:g}" for cost, most in zip(scales.costs, scales.safe_at_most, strict=True)
    )
    return [
        f"{q.opened.title([q.iterate])} ({inputs.dtype}, {inputs.device}), trained at lambda {lam}",
        *(line for read in q.sets for line in read.lines()),
        q.opened.sampling_text(flags.seed),
        f"responses per prompt and side: {q.config.eval_responses}; safe ones have a cost {safe}; refusals "
        f"are told by {q.refusals_by}; scores and costs are in the scorers' own units",
    ]


def _overlaps(q: Asked, flags: EvaluateConfig) -> list[str]:
    """Says which sets hold training prompts that --allow-overlap has kept."""
    kept = [read for read in q.sets if read.trained_on and flags.allow_overlap]
    return [
        f"{read.set.name}: {read.trained_on} prompts are training prompts of the run: what follows may be "
        "better than on new prompts"
        for read in kept
    ]


def _rows(read: ReadSet, before: Samples, after: Samples, sides: Sequence[Answers]) -> list[str]:
    """Returns a line of JSON per prompt and pair of responses of a set, with their scores in the scorers' own
    units."""
    n, lines = before.rollouts.n, []
    for r in range(len(before.texts)):
        p, i = divmod(r, n)
        row = {
            "set": read.set.name,
            "prompt": read.prompts.text[p],
            "kind": read.prompts.kind[p],
            "sample": i,
        }
        for name, samples, side in zip(("reference", "policy"), (before, after), sides, strict=True):
            row[name] = samples.texts[r]
            row[f"{name}_finished"] = bool(samples.rollouts.finished[r])
            row[f"{name}_refused"] = side.refused[r]
            row[f"{name}_reward"] = float(samples.scores.reward_PG[p, i])
            row[f"{name}_cost"] = (-samples.scores.utility_PGJ[p, i]).tolist()
            row[f"{name}_audit"] = (-samples.scores.audit_PGA[p, i]).tolist()
        lines.append(json.dumps(row, sort_keys=True, ensure_ascii=False))
    return lines


def _write(folder: Path, q: Asked, flags: EvaluateConfig, verdicts: Sequence[SetVerdict], gaps: dict) -> None:
    """Writes profile.json, profile.png and profile.html."""
    config, scales = q.config, q.scales
    settings = {
        f: getattr(config, f)
        for f in ("temperature", "top_p", "top_k", "max_new_tokens", "reward", "cost", "audit")
    }
    settings |= {
        "iterate": q.iterate,
        "lam": q.opened.iterates[q.iterate],
        "seed": flags.seed,
        "safe_at_most": list(scales.safe_at_most),
        "refusals_by": q.refusals_by,
        "confidence": flags.confidence,
        "allow_overlap": flags.allow_overlap,
    }
    sources = {
        read.set.name: {"source": read.set.source, "trained_on": read.trained_on, "read": read.said}
        for read in q.sets
    }
    found = {
        "profile": q.profile.name,
        "sets": [verdict.as_dict() | sources[verdict.name] for verdict in verdicts],
        "left_out": q.left_out,
        "logprob_gap": gaps,
        "settings": settings,
    }
    write_json(folder / "profile.json", found)
    title = f"Profile {q.profile.name}: {q.opened.title([q.iterate])}"
    image = profile_page.picture(title, verdicts, flags.confidence)
    write_whole(folder / "profile.png", image)
    said = [*_opening(q, flags), *q.left_out, *_overlaps(q, flags)]
    page = profile_page.page(title, verdicts, said, image, flags.confidence)
    write_whole(folder / "profile.html", page.encode("utf-8", "replace"))
