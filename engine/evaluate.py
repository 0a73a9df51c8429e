"""`python -m engine.evaluate RUN [flags]`: judge an iterate of a run on held-out prompts, with fresh responses.

Reference and policy answer the same prompts with the run's own sampling settings; units and thresholds are those that the run fixed. To
the run's verdict this adds the slack, scorers that the run did not know, how often the policy orders pairs as the Lagrangian does, and
refusals on harmless prompts that look dangerous. Nothing is saved on the way: the folder of the results appears whole at the end.
RUN/judged.jsonl keeps which prompts have judged the run, so that a second look at a test split is told as one.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import constraints, dual
from engine.config import EvaluateConfig, RunConfig, check_evaluate, shown_name, was_by_preference
from engine.config.flags import parse_flags
from engine.constraints import Limit
from engine.data.prompts import assert_disjoint, lookalike_prompts, overlap
from engine.errors import UserError
from engine.files import write_json
from engine.model import packing
from engine.policy.forward import frozen_forward
from engine.policy.iterates import is_saved, load_weights
from engine.policy.weights import Weights
from engine.records import Prompts, Units
from engine.run import rows as metrics_rows
from engine.run.display import Display, Progress
from engine.run.plan import evaluation_rows
from engine.run.run import Run
from engine.scorers.base import Scorers
from engine.scorers.find import load_scorers
from engine.scorers.scoring import try_out
from engine.stages import preference, sampling
from engine.stages.inputs import DEFAULT_MODEL, Inputs, read_prompts
from engine.stages.job import Subject, heldout_prompts, reference_prompts
from engine.stages.reference import units_of
from engine.stages.sampling import Sampled, gap_text, respond, sample
from engine.stages.verdict import judge, write_heldout
from engine.verdict.evaluation import Judgement, pair_order
from engine.verdict.refusals import over_refusal
from engine.verdict.sentences import judgement_sentences

USAGE = "usage: python -m engine.evaluate RUN [flags]\n\nRUN is the folder of a run of engine.train with at least one iterate.\n"
JUDGED = "judged.jsonl"


class Phase:
    """What sampling asks of a stage (`engine.run.store.Stage`), where nothing is saved: progress. Ctrl-C stops at once."""

    def __init__(self, display: Display, number: int, name: str) -> None:
        self.name, self.logprob_gap = name, None  # that of its samples, as `stages.log_gap` gives it
        self._display = display
        display.stage(number, name)

    def row(self, kind: str, **values: Any) -> None:
        """Print and keep what `stages.log_gap` found, the only row of sampling."""
        self.logprob_gap = values["logprob_gap"]
        self._display.line(f"{self.name}: {gap_text(values)}")

    def progress(self, total: int, unit: str, what: str) -> Progress:
        """A progress bar; `unit` is a plural such as "tokens"."""
        return self._display.progress(total, unit, what)

    def timing(self, **values: float) -> None:
        """Speeds are seen while they last, and not kept."""

    def check_stop(self) -> None:
        """Ctrl-C is not held back, so there is nothing to ask."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be judged, read and checked; no weights are loaded yet."""

    run: Path
    algorithm: str
    config: RunConfig  # the run's, with the flags' device, threads, number of responses and further audits
    iterates: dict[int, list[float]]  # those to choose from, with the multipliers that each was trained at; one unless --best-feasible
    selection: Prompts | None  # what they are chosen on
    by_preference: bool  # scores are log-ratios of policies that the run aligned to preferences
    units: Units  # of the run's scorers; further audits have none yet
    limits: list[Limit]
    aimed: list[float]  # in each constraint's own measure
    trained_on: Prompts
    inputs: Inputs
    scorers: Scorers
    prompts: Prompts
    pool: int  # prompts that these are a subset of
    shared: str  # says which prompts are training prompts too; "" where none is
    lookalikes: Prompts
    safety_alone: bool  # plain DPO on g: pairs are to have the order of g
    judged_before: int  # final verdicts on the run that these prompts gave, the run's own among them
    fewer_rows: bool  # memory is short, so that fewer responses are decoded side by side than in the run


def ask(run: str | Path, flags: EvaluateConfig) -> Question:
    """Read the run and check everything that can be checked without compute.

    Raises: UserError.
    """
    check_evaluate(flags)
    run = Path(run)
    algorithm, values = Run.read_config(run)
    config = RunConfig(**{f.name: values[f.name] for f in fields(RunConfig) if f.name in values})
    iterates = _iterates(run, flags.iterate, every=flags.best_feasible)
    config = replace(
        config, device=flags.device or config.device, threads=flags.threads or config.threads, audit=(*config.audit, *flags.audit),
        eval_responses=flags.n_responses or config.eval_responses,
    )  # fmt: skip
    if config.eval_responses < 2:
        raise UserError("the run's verdict has 1 response per prompt, and pairs need 2; give --n-responses.")
    inputs = Inputs.of(config)
    Run.check_model(run, inputs.fingerprint)
    pool = read_prompts(flags.prompts, config, inputs.tokenizer, inputs.shape) if flags.prompts else inputs.heldout
    n = min(flags.n_prompts or (len(pool) if flags.prompts else config.eval_prompts), len(pool))
    if n < 2:
        raise UserError(f"{n} prompt(s): a standard error needs at least 2; give more with --prompts.")
    prompts = heldout_prompts(replace(config, eval_prompts=n), pool)
    common, shared = overlap(prompts, inputs.train, inputs.tokenizer), ""
    if common:
        shared = f"{len(common)} of {n} prompts are among the run's training prompts, the first is {prompts.text[common[0]][:60]!r}"
        if not flags.allow_overlap:
            raise UserError(f"{shared}; give others with --prompts, or go on with --allow-overlap.")
    own = heldout_prompts(replace(config, eval_prompts=min(config.eval_prompts, len(inputs.heldout))), inputs.heldout)
    selection = own if flags.best_feasible else None
    if selection:
        assert_disjoint(selection, prompts, "prompt on which the iterate is chosen")
    lookalikes = read_prompts(lookalike_prompts(), replace(config, prompt_column="prompt"), inputs.tokenizer, inputs.shape)
    asked = [len(ids) for group in (prompts, lookalikes, selection) if group for ids in group.token_ids]
    most = max(len(prompts), len(selection) if selection else 0)
    rows = evaluation_rows(config, inputs.shape, inputs.dtype, inputs.device, asked, most)
    fewer, config = rows < config.rollout_rows, replace(config, rollout_rows=rows)
    scorers = load_scorers(config.reward, config.cost, config.audit, folder=inputs.folder, trunk=inputs.fingerprint, device=inputs.device)
    (reference,) = metrics_rows.read_rows(run, "reference")
    limits = constraints.limits(config, [s.name for s in scorers.costs])
    constraints.check_prompts(limits, {"prompts": prompts} | ({"held-out prompts": selection} if selection else {}))
    units = units_of(reference, limits)
    by_preference = was_by_preference(algorithm, values)
    # Aims of log-ratios, which are improvements, were fixed with their units.
    aimed = metrics_rows.read_rows(run, "dual")[0]["aim"] if by_preference else reference.get("aimed", reference["aim"])
    return Question(
        run=run, algorithm=algorithm, config=config, iterates=iterates, selection=selection, by_preference=by_preference,
        units=units, limits=limits, aimed=aimed, inputs=inputs,
        trained_on=reference_prompts(config, inputs.train), scorers=scorers, prompts=prompts, pool=len(pool), shared=shared,
        lookalikes=lookalikes, safety_alone=algorithm == "dpo" and values.get("objective") == "safety",
        judged_before=_judged_before(run, prompts, own), fewer_rows=fewer,
    )  # fmt: skip


def run_evaluation(run: str | Path, flags: EvaluateConfig) -> tuple[Judgement, Path]:
    """Judge an iterate of `run` and write evaluation.json and heldout.jsonl; returns what was found, and their folder.

    Raises: UserError, before any compute unless a scorer fails.
    """
    out = Path(flags.out) if flags.out else _next_folder(Path(run))
    if out.exists():
        raise UserError(f"--out {out} exists; name a folder that does not.")
    q = ask(run, flags)
    config, prompts, n = q.config, q.prompts, q.config.eval_responses
    first = 1 + len(q.iterates) if q.selection else 0
    display = Display(n_stages=first + 4)
    for line in _opening(q, flags):
        display.line(line)
    for warning in try_out(q.scorers, prompts.text):
        display.warn(warning)
    if q.shared:
        display.warn(f"{q.shared}: what follows may be better than on new prompts")
    with whole_folder(out) as folder, display:
        subject = Subject.load(replace(config, seed=flags.seed), q.inputs, q.scorers)
        tried = _try_all(q, subject, display) if q.selection else []
        iterate = best_feasible(tried) if tried else next(iter(q.iterates))
        adapter = load_weights(q.run / "adapters" / f"iteration-{iterate}", subject.model)
        # The purposes of the run's own verdict, so that its seed gives its responses.
        phase = Phase(display, first + 1, "heldout/reference")
        before, _ = sample(subject, phase, prompts, None, n=n, purpose=-1)
        gaps = {"reference": phase.logprob_gap}
        units = _with_new_audits(q, before, display)
        phase = Phase(display, first + 2, "heldout/policy")
        after, _ = sample(subject, phase, prompts, adapter, n=n, purpose=-2)
        gaps["policy"] = phase.logprob_gap
        moved_PG = policy_logprob(subject, phase, prompts, before, adapter) - before.scores.ref_logprob_PG
        in_units, units, audits = _counted(q, subject, units)
        before, after = (in_units(phase, prompts, side) for side in (before, after))
        _, texts_before = respond(subject, Phase(display, first + 3, "lookalike/reference"), q.lookalikes, None, n=n, purpose=-3)
        _, texts_after = respond(subject, Phase(display, first + 4, "lookalike/policy"), q.lookalikes, adapter, n=n, purpose=-4)

        lam_J = torch.tensor(q.iterates[iterate], dtype=torch.float64)
        log_ratios = ((before, moved_PG), (after, after.kl_PG))

        def wanted(s: Sampled) -> Tensor:
            utility_PG = constraints.weighted(q.limits, s.scores, prompts, q.trained_on) @ lam_J
            return utility_PG if q.safety_alone else s.scores.reward_PG + utility_PG

        judgement = Judgement(
            evaluation=judge(prompts, before, after, q.limits, q.aimed, units, audits, flags.confidence),
            pair_order=tuple(pair_order(x_PG, wanted(s), flags.confidence) for s, x_PG in log_ratios),
            over_refusal=over_refusal(texts_before, texts_after, len(q.lookalikes), flags.confidence),
            pairs_like="g" if q.safety_alone else "r + lambda g",
        )
        write_heldout(folder, prompts, before, after)
        settings = {f: getattr(config, f) for f in ("temperature", "top_p", "max_new_tokens", "reward", "cost", "audit")}
        settings |= {
            "iterate": iterate,
            "lam": q.iterates[iterate],
            "selection": tried,
            "seed": flags.seed,
            "units": asdict(units),
            "overlap": q.shared,
        }
        write_json(folder / "evaluation.json", {**judgement.as_dict(), "logprob_gap": gaps, "settings": settings})
        try:
            with open(q.run / JUDGED, "a") as file:
                file.write(json.dumps({"prompts": len(prompts), "sha256": _hash(prompts)}) + "\n")
        except OSError as error:
            display.warn(f"{q.run / JUDGED} cannot be written ({error.strerror}), so these prompts are not on record")
        for line in judgement_sentences(judgement):
            display.line(line)
    display.line(f"written: {out / 'evaluation.json'} and {out / 'heldout.jsonl'}")
    return judgement, out


def _hash(prompts: Prompts) -> str:
    """Of a set of prompts, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(prompts.text)).encode()).hexdigest()


def _judged_before(run: Path, prompts: Prompts, own: Prompts) -> int:
    """How many final verdicts these prompts have given on the run. own: those of the run's own verdict."""
    known = [_hash(own)] if (run / "evaluation.json").is_file() else []
    if (run / JUDGED).is_file():
        known += [json.loads(line)["sha256"] for line in (run / JUDGED).read_text().splitlines()]
    return known.count(_hash(prompts))


def _try_all(q: Question, subject: Subject, display: Display) -> list[dict]:
    """Every iterate on the selection prompts: rows of iterate, lam, reward and room (improvement - what is required) of each constraint."""
    n, rows = q.config.eval_responses, []
    # Further audits have no unit here, and are not needed to choose.
    further = len(q.scorers.audits) - len(q.units.audit_A)
    in_units, units, audits = _counted(q, subject, replace(q.units, audit_A=[*q.units.audit_A, *[1.0] * further]))
    phase = Phase(display, 1, "selection/reference")
    before = in_units(phase, q.selection, sample(subject, phase, q.selection, None, n=n, purpose=-5)[0])
    for number, (iterate, lam) in enumerate(q.iterates.items(), 2):
        adapter = load_weights(q.run / "adapters" / f"iteration-{iterate}", subject.model)
        phase = Phase(display, number, f"selection/{iterate}")
        after = in_units(phase, q.selection, sample(subject, phase, q.selection, adapter, n=n, purpose=-5 - number)[0])
        e = judge(q.selection, before, after, q.limits, q.aimed, units, audits)
        room = [c.estimate.mean - c.required for c in e.constraints]
        rows.append({"iterate": iterate, "lam": lam, "reward": e.reward.mean, "room": room})
        display.line(
            f"iterate {iterate}: reward {e.reward.mean:+.2f}, "
            + ", ".join(f"{c.name} {x:+.2f} beyond what is required" for c, x in zip(e.constraints, room, strict=True))
        )
    chosen = best_feasible(rows)
    met = sum(min(row["room"]) >= 0 for row in rows)
    display.line(
        f"iterate {chosen} is judged: "
        + (f"the most reward of the {met} that meet every constraint" if met else "none meets every constraint, and it misses least")
        + f" on {len(q.selection)} held-out prompts; what follows is on others"
    )
    return rows


def _counted(q: Question, subject: Subject, units: Units) -> tuple[Callable[[Phase, Prompts, Sampled], Sampled], Units, list[str]]:
    """(what puts samples' scores into the run's units, the units, names of the audits); units: of the scorers."""
    if not q.by_preference:
        return lambda phase, prompts, sampled: sampling.in_units(sampled, units), units, [s.name for s in q.scorers.audits]
    ratios, of_ratios = preference.restored(q.run, subject, units)

    def in_units(phase: Phase, prompts: Prompts, sampled: Sampled) -> Sampled:
        return sampling.in_units(replace(sampled, scores=ratios(phase, prompts, sampled)), of_ratios)

    return in_units, of_ratios, preference.audit_names(q.scorers)


def best_feasible(rows: list[dict]) -> int:
    """The iterate with the most reward among those with room >= 0 in every constraint; where there is none, with the most room."""
    feasible = [row for row in rows if min(row["room"]) >= 0]
    best = max(feasible, key=lambda row: row["reward"]) if feasible else max(rows, key=lambda row: min(row["room"]))
    return best["iterate"]


def policy_logprob(subject: Subject, phase: Phase, prompts: Prompts, sampled: Sampled, adapter: Weights) -> Tensor:
    """log pi of given responses under the policy `adapter`, float64 [P, G], nats."""
    groups = packing.groups(prompts, sampled.rollouts)
    with phase.progress(sum(g.tokens for g in groups), "tokens", "pair order") as made:
        _, logprob = frozen_forward(
            subject.model, groups, [], temperature=subject.config.temperature,
            memory_budget_bytes=subject.config.memory_budget_bytes, adapter=adapter, on_tokens=made.advance,
        )  # fmt: skip
    return logprob.view(len(prompts), -1)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; after an error or Ctrl-C it is gone.

    Raises: UserError where it cannot be made, or `out` has come into being meanwhile.
    """
    partial = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another place.") from error
    try:
        yield partial
        try:
            partial.rename(out)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _next_folder(run: Path) -> Path:
    number = 1
    while (run / f"evaluation-{number}").exists():
        number += 1
    return run / f"evaluation-{number}"


def _iterates(run: Path, wanted: int, *, every: bool) -> dict[int, list[float]]:
    """The iterate to judge (0: the last one), or every one, with the multipliers it was trained at. Those past --max-kl were put aside by
    the run.

    Raises: UserError when there is none, or not the wanted one.
    """
    saved = {int(p.name.rpartition("-")[2]) for p in run.glob("adapters/iteration-*") if is_saved(p)}
    lam_of = {row["iteration"]: row["lam"] for row in metrics_rows.read_rows(run, "policy")} if saved else {}
    there = sorted(saved & lam_of.keys())
    if not there:
        raise UserError(f"{run} has no iterate yet; go on with python -m engine.train --resume {run}.")
    if wanted and wanted not in there:
        raise UserError(f"--iterate {wanted}: {run} has {', '.join(map(str, there))}; give one of these.")
    return {iterate: lam_of[iterate] for iterate in (there if every else [wanted or there[-1]])}


def _opening(q: Question, flags: EvaluateConfig) -> list[str]:
    """What is judged, and how the responses are drawn."""
    config, inputs = q.config, q.inputs
    lam = ", ".join(f"{x:.3f}" for x in list(q.iterates.values())[-1])
    which = f"iterates {', '.join(map(str, q.iterates))}" if q.selection else f"iterate {next(iter(q.iterates))}"
    times = "once" if q.judged_before == 1 else f"{q.judged_before} times"
    again = [f"these prompts have judged this run {times} before; the interval does not allow for that"] if q.judged_before else []
    own = "so the random numbers are those of its verdict" if flags.seed == config.seed else "so no response was seen before"
    return [
        f"{which} of {q.run}: {shown_name(q.algorithm)} on {config.model or DEFAULT_MODEL} ({inputs.dtype}, {inputs.device}), "
        f"{'the last one ' if q.selection else ''}trained at lambda {lam}",
        f"prompts: {len(q.prompts)} of {q.pool} in {flags.prompts or 'the held-out set of the run'}, "
        f"and {len(q.lookalikes)} harmless look-alikes of dangerous ones",
        f"reference and policy: temperature {config.temperature:g}, top_p {config.top_p:g}, at most {config.max_new_tokens} new tokens, "
        f"seed {flags.seed} (the run's is {config.seed}, {own})",
        *again,
        *([f"memory is short, so {config.rollout_rows} responses are decoded side by side"] if q.fewer_rows else []),
    ]


def _with_new_audits(q: Question, before: Sampled, display: Display) -> Units:
    """The run's units, and those of audits that the run did not know, measured on the reference's responses."""
    measured = []
    for a in range(len(q.units.audit_A), len(q.scorers.audits)):
        name = q.scorers.audits[a].name
        measured.append(dual.within_deviation(before.scores.audit_PGA[..., a], f"scorer {name}"))
        display.line(
            f"audit {name}: the run fixed no unit for it; the within-prompt standard deviation of the reference's responses here is "
            f"{measured[-1]:.3g} of the scorer's units"
        )
    return replace(q.units, audit_A=[*q.units.audit_A, *measured])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        run = ""
        if not ("--help" in argv or "-h" in argv):
            if not argv or argv[0].startswith("-"):
                raise UserError("no run is named; usage: python -m engine.evaluate RUN [flags], see --help.")
            run, argv = argv[0], argv[1:]
        flags = parse_flags(
            EvaluateConfig, argv, prog="python -m engine.evaluate RUN", usage=USAGE, first="run folder", default=EvaluateConfig()
        )
        if flags is None:
            return 0
        run_evaluation(run, flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
