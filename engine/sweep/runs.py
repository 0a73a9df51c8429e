"""`python -m engine.sweep`: several algorithms along a path of thresholds, on one set of reference samples for each seed.

For each seed the reference is sampled once (run folder samples-seedSEED) and the dual is solved at all thresholds, each from its
neighbour's multipliers and for each beta and margin, before anything is trained; thresholds that the samples do not support are named
there, but for algorithms that know none. Then every run is an ordinary run folder, made by `engine.train`'s own functions with
--samples-of. After each of them the sweep's files are written anew: table.csv, pareto.png, multipliers.png and index.html.
"""

import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

from engine.config import ALGORITHMS, fit
from engine.errors import NonFiniteError, UserError
from engine.files import write_json
from engine.report import run_page
from engine.stages.job import open_job
from engine.stages.reference import reference_of
from engine.stages.run import RunStages
from engine.stages.solve import one_shot
from engine.sweep.outcomes import Outcome, finished, read_run
from engine.sweep.pages import write
from engine.sweep.plans import Plan, SweepConfig, configs_of, numbers


def _begun(folder: Path) -> str | None:
    """The folder where a run in it can go on; what a run left that was killed before it began is removed."""
    if (folder / "config.json").is_file():
        return str(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def run_sweep(sweep: SweepConfig, preset: str | None = None, *, resume: bool = False) -> list[Outcome]:
    """Do all runs that are not done yet and write the sweep's files.

    Raises: UserError before anything is sampled, or where the samples do not support a threshold; Interrupted.
    """
    out = Path(sweep.out)
    plans = configs_of(sweep, preset)
    if not resume:
        # What a kill leaves before sweep.json is there is nothing.
        if out.exists() and not (
            out.is_dir() and {path.name for path in out.iterdir()} <= {"sweep.json.tmp"}
        ):
            raise UserError(f"--out {out} exists; name another folder, or go on with --resume {out}.")
        out.mkdir(parents=True, exist_ok=True)
        settings = {
            "preset": preset,
            **{f.name: getattr(sweep, f.name) for f in fields(sweep) if f.name != "out"},
        }
        write_json(out / "sweep.json", settings)
    paths = {}
    for seed in sweep.seeds:
        own = [plan for plan in plans if plan.config.seed == seed]
        paths[seed] = draw_samples(own)
    outcomes: list[Outcome] = []
    for number, plan in enumerate(plans, 1):
        print(f"\nrun {number} of {len(plans)}: {plan.folder.name}", flush=True)
        outcomes.append(read_run(plan, _train(plan)))
        write(out, outcomes, paths)
    print(
        f"\nsweep: {out / 'index.html'}, {out / 'table.csv'}, {out / 'pareto.png'}, {out / 'multipliers.png'}"
    )
    return outcomes


def draw_samples(plans: list[Plan]) -> list[dict]:
    """The reference's samples of one seed, and the dual along the thresholds for each beta and margin: rows of threshold, beta, margin,
    aim, lambda and what it predicts. Not of algorithms without a threshold, nor of scores that are only there after policies are aligned.

    Raises: UserError for thresholds beyond what the samples support, before anything is trained.
    """
    # Settings of iterative algorithms also say which prompts measure a slack; the samples do not depend on them.
    config = replace(plans[0].config, samples_of="", out=plans[0].config.samples_of)
    rows, guess, seen = [], None, []
    with open_job("samples", config, _begun(Path(config.out)), n_stages=2) as job:
        stages = RunStages(job)
        stages.sample_reference()
        stages.heldout(None)
        for plan in sorted(plans, key=lambda plan: (plan.config.beta, plan.config.margin, plan.threshold)):
            if not plan.config.has_thresholds or plan.config.by_preference:
                continue
            own, _ = fit(plan.config, len(job.train), len(job.heldout))
            reference = reference_of(
                replace(job, config=own), stages.reference.prompts, stages.reference.sampled, None
            )
            aim_J, beta = reference.aim_J, own.beta
            problem = aim_J.tolist(), reference.limits, beta, own.lam_max, own.force
            if problem in seen:
                continue
            seen.append(problem)
            try:
                solution = one_shot(replace(job, config=own), reference, start_J=guess)
            except UserError as error:
                raise UserError(
                    f"--thresholds {','.join(f'{b:g}' for b in plan.threshold)}: {error} Or leave it out; all other flags of a sweep stand "
                    "behind --."
                ) from error
            guess = solution.lam
            rows.append({
                "threshold": plan.threshold, "beta": beta, "margin": own.margin, "aim": aim_J.tolist(), "lam": solution.lam.tolist(),
                "predicted": solution.predicted_improvement.tolist(), "ess": float(solution.ess.mean()),
            })  # fmt: skip
            job.run.display.line(
                f"b {numbers(plan.threshold)} (beta {beta:g}, margin {own.margin:g}): aim {numbers(aim_J.tolist())}, one-shot lambda "
                f"{numbers(solution.lam.tolist())}, effective sample size {rows[-1]['ess']:.1f} of {own.n_responses}"
            )
    return rows


def _train(plan: Plan) -> str:
    """Train and judge, or go on with a run that was stopped, unless it is done; returns what it failed with, or ""."""
    if not (plan.folder / "evaluation.json").is_file():
        try:
            ALGORITHMS[plan.algorithm].train(plan.config, resume=_begun(plan.folder))
        except NonFiniteError as stop:
            print(f"error: {stop}", file=sys.stderr)
            return str(stop)
    elif not finished(plan):
        run_page.write(plan.folder)
    return ""
