"""Doing the runs of a sweep: several algorithms along a path of thresholds, on one set
of reference samples a seed.

For each seed the reference is sampled once (run folder samples-seedSEED), and the dual is solved at all
thresholds before anything is trained, each from its neighbour's multipliers and for each beta and margin. A
threshold that the samples do not support is named at that point, unless the algorithm knows no threshold.
Then every run is an ordinary run folder, which the algorithm fills with --samples-of. After each run the
sweep's files are written anew: table.csv, pareto.png, multipliers.png and index.html.
"""

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from engine.config import ALGORITHMS, fit, published
from engine.errors import NonFiniteError, UserError
from engine.files import is_folder, is_there, make_folder, write_json
from engine.ranks import ALONE, Ranks
from engine.run.folder import RunFolder
from engine.stages.job import open_job
from engine.stages.published import check_published
from engine.stages.reference import reference_of
from engine.stages.run import RunStages
from engine.stages.run_inputs import owned_inputs, source_digests
from engine.stages.solve import one_shot
from engine.stages.verdict import looks
from engine.sweep.outcomes import OneShot, Outcome, finished, read_run
from engine.sweep.pages import write
from engine.sweep.plans import Plan, SweepConfig, configs_of, numbers


def run_sweep(
    sweep: SweepConfig, preset: str | None = None, *, resume: bool = False, ranks: Ranks = ALONE
) -> list[Outcome]:
    """Does all runs that are not done yet and writes the sweep's files.

    ranks: share out each run; of several, rank 0 alone prints and has the sweep's folder.

    Raises: UserError before anything is sampled, or where the samples do not
    support a threshold; Interrupted.
    """
    out = Path(sweep.out)
    ranks.check_alike({f"--{f.name}": str(getattr(sweep, f.name)) for f in fields(sweep)})
    plans = configs_of(sweep, preset)
    ranks = ranks.arranged(plans[0].config.model_ranks)  # once for all runs
    if preset is not None:
        wanted = {flag: name for plan in plans for flag, name in published(preset, plan.config).items()}
        check_published(preset, wanted)
    if not resume:
        ranks.first(lambda: _begin(sweep, preset, out))
    paths = {
        seed: draw_samples([plan for plan in plans if plan.config.seed == seed], ranks)
        for seed in dict.fromkeys(sweep.seeds)
    }
    outcomes: list[Outcome] = []
    for number, plan in enumerate(plans, 1):
        if ranks.is_first:
            print(f"\nrun {number} of {len(plans)}: {plan.folder.name}", flush=True)
        done, begun_in = ranks.first(lambda plan=plan: _standing(plan, plans))
        failed_with = "" if done else _train(plan, begun_in, ranks)

        def note(plan: Plan = plan, failed_with: str = failed_with) -> Outcome:
            outcome = read_run(plan, failed_with)
            write(out, [*outcomes, outcome], paths)
            return outcome

        outcomes.append(ranks.first(note))
    if ranks.is_first:
        pages = ", ".join(
            str(out / name) for name in ("index.html", "table.csv", "pareto.png", "multipliers.png")
        )
        print(f"\nsweep: {pages}")
    return outcomes


def _begin(sweep: SweepConfig, preset: str | None, out: Path) -> None:
    """Makes the sweep's folder. Raises: UserError where something is there."""
    # A sweep that was killed before sweep.json was whole has left nothing else.
    if is_there(out) and not (is_folder(out) and set(os.listdir(out)) <= {"sweep.json.tmp"}):
        raise UserError(f"--out {out} exists; name another folder, or go on with --resume {out}.")
    make_folder(out)
    settings = {f.name: getattr(sweep, f.name) for f in fields(sweep) if f.name != "out"}
    write_json(out / "sweep.json", {"preset": preset, **settings})


def _standing(plan: Plan, plans: list[Plan]) -> tuple[bool, str | None]:
    """Tells whether a run is done, and where it goes on, see `begun`. Raises: UserError."""
    check_sources(plan, plans)
    done = finished(plan)
    return done, None if done else begun(plan.folder)


def draw_samples(plans: list[Plan], ranks: Ranks = ALONE) -> list[OneShot]:
    """Draws the reference's samples of one seed and solves the dual along the thresholds,
    for each beta and margin.

    The dual is not solved for algorithms without thresholds, nor for scores that exist only
    once policies are aligned.
    Raises: UserError for thresholds beyond what the samples support, before anything is trained.
    """
    # Any of the configs will do: the samples do not depend on the settings in which they differ.
    config = replace(plans[0].config, samples_of="", out=plans[0].config.samples_of)
    solved, seen = [], []
    resume = ranks.first(lambda: begun(Path(config.out)))
    with open_job("samples", config, resume, n_stages=2, ranks=ranks) as job:
        stages = RunStages(job)
        stages.sample_reference()
        stages.heldout(looks(job)[0])
        for plan in sorted(plans, key=lambda plan: (plan.config.beta, plan.config.margin, plan.threshold)):
            if not plan.config.has_thresholds or plan.config.by_preference:
                continue
            fitted, _ = fit(plan.config, len(job.train), len(job.heldout))
            plan_job = replace(job, config=fitted)
            reference = reference_of(plan_job, stages.reference.samples)
            aim = reference.aim_J.tolist()
            problem = aim, reference.limits, fitted.beta, fitted.lam_max, fitted.force
            if problem in seen:
                continue
            seen.append(problem)
            guess_J = torch.tensor(solved[-1].lam, dtype=torch.float64) if solved else None
            try:
                solution = one_shot(plan_job, reference, start_J=guess_J)
            except UserError as error:
                raise UserError(
                    f"--thresholds {','.join(f'{b:g}' for b in plan.threshold)}: {error} Or leave it out; "
                    "all other flags of a sweep stand behind --."
                ) from error
            solved.append(
                OneShot(
                    threshold=plan.threshold,
                    beta=fitted.beta,
                    margin=fitted.margin,
                    aim=aim,
                    lam=solution.lam.tolist(),
                    predicted=solution.predicted_improvement.tolist(),
                    ess=float(solution.ess.mean()),
                )
            )
            job.run.display.line(_sentence(solved[-1], fitted.n_responses))
    return solved


def _sentence(s: OneShot, n_responses: int) -> str:
    """Says a solution in one line for the user."""
    return (
        f"b {numbers(s.threshold)} (beta {s.beta:g}, margin {s.margin:g}): aim {numbers(s.aim)}, one-shot "
        f"lambda {numbers(s.lam)}, effective sample size {s.ess:.1f} of {n_responses}"
    )


def check_sources(plan: Plan, plans: list[Plan]) -> None:
    """Checks that a run which has not begun will read the files that the runs before it have read.

    Raises: UserError for a file that has changed, since the runs would not compare.
    """
    if begun(plan.folder) is not None:
        return
    now = source_digests(plan.config)
    for other in plans:
        if RunFolder(other.folder).config.is_file():
            for flag, files in owned_inputs(other.folder).record.sources.items():
                for file, digest in files.items():
                    if now.get(flag, {}).get(file, digest) != digest:
                        raise UserError(
                            f"{flag} {file} has changed since {other.folder} began, so the runs of this "
                            "sweep would not compare; put the original back."
                        )


def _train(plan: Plan, resume: str | None, ranks: Ranks) -> str:
    """Does a run, or the rest of the one in the folder `resume`; returns the error that it failed with, or an
    empty text. All ranks fail with it alike."""
    more = {} if ranks.size == 1 else {"ranks": ranks}
    try:
        ALGORITHMS[plan.algorithm].train(plan.config, resume=resume, **more)
    except NonFiniteError as stop:
        if ranks.is_first:
            print(f"error: {stop}", file=sys.stderr)
        return str(stop)
    return ""


def begun(folder: Path) -> str | None:
    """Returns the folder where a run in it can be resumed; None where there is none.

    Raises: UserError where other files are in the way: a sweep deletes nothing that it has not written.
    """
    if RunFolder(folder).config.is_file() or RunFolder(folder).inputs.is_file():
        return str(folder)
    if is_there(folder):
        raise UserError(
            f"{folder}: no run, and in its way; move it away, then go on with --resume {folder.parent}."
        )
    return None
