"""The stages that the algorithms share: open a run, sample and score, solve the dual, update, measure the
slack, give the verdict."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path

from engine import constraints, keys, model
from engine.config import OF_THE_COMMAND, RunConfig, check, fit, shown_name, with_steps
from engine.data.dealing import deal, subset
from engine.data.prompts import first_look
from engine.data.response_pairs import ResponsePairs
from engine.data.samples_file import GivenSamples
from engine.errors import UserError
from engine.looks import last_error
from engine.model.decoder import Decoder
from engine.model.parallel import load_spread
from engine.ranks import ALONE, Ranks
from engine.records import Prompts
from engine.run.contents import read_contents
from engine.run.display import Display
from engine.run.folder import RunFolder
from engine.run.plan import Plan
from engine.run.run import Run
from engine.scorers.answers import Answers
from engine.scorers.base import Scorers
from engine.scorers.find import content, sizes
from engine.scorers.scoring import try_out
from engine.stages import alike
from engine.stages.inputs import DEFAULT_MODEL, Inputs, clock, prepare_process, read_inputs, scorers_of
from engine.stages.pair_files import pairs_of, preferences_of
from engine.stages.protocol import stages_of
from engine.stages.run_inputs import (
    DamagedInputs,
    OwnedInputs,
    RunInputs,
    copies,
    owned_inputs,
    restore_inputs,
    source_digests,
)
from engine.stages.shared import SharedSamples, check_samples_of, spelled_alike

# Responses that a GPU decodes side by side where memory holds them: a step reads all weights, for few rows or
# many.
ROWS_ON_GPU = 1024


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are sampled and scored."""

    seed: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    rows: int  # responses decoded side by side
    memory_budget_bytes: int | None  # of the loss head; None: the op's default
    adapter_from: float | None  # share of the layers below an adapter; None where all weights are trained

    @staticmethod
    def of(config: RunConfig) -> "SamplingSettings":
        """Returns those of a run."""
        return SamplingSettings(
            seed=config.seed,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            rows=config.rollout_rows,
            memory_budget_bytes=config.memory_budget_bytes,
            adapter_from=config.lora_from if config.tune == "lora" else None,
        )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Holds what sampling and scoring need: the loaded model, its scorers and how responses are sampled."""

    settings: SamplingSettings
    folder: Path  # the model's Hugging Face folder
    texts: Path  # tokenizer, chat templates and what else goes along with its weights
    model: Decoder
    tokenizer: object
    scorers: Scorers
    stop_token_ids: tuple[int, ...]
    ranks: Ranks = ALONE  # that share out the prompts
    answers: Answers = field(default_factory=Answers)  # of judges behind HTTP

    @staticmethod
    def load(
        settings: SamplingSettings,
        inputs: Inputs,
        scorers: Scorers,
        ranks: Ranks = ALONE,
        shards: int | None = None,
    ) -> "Subject":
        """Loads the weights; where several ranks train all of them, each has some rows, and where ranks hold
        one model together, each has a slice.

        shards: ranks that the weights are spread over, see `engine.run.plan`; None: all."""
        folder, options = inputs.folder, {"dtype": inputs.dtype, "device": inputs.device}
        if ranks.size > 1 and settings.adapter_from is None:
            network = load_spread(folder, **options, ranks=ranks, copies=ranks.size // (shards or ranks.size))
        elif ranks.model is not None:
            say = {} if ranks.is_first else {"say": lambda sentence: None}
            network = ranks.agreed(lambda: model.load(folder, **options, slices=ranks.model, **say))
        else:
            network = model.load(folder, **options)
        return Subject(
            settings=settings,
            folder=inputs.folder,
            texts=inputs.texts,
            model=network,
            tokenizer=inputs.tokenizer,
            scorers=scorers,
            stop_token_ids=inputs.stop_token_ids,
            ranks=ranks,
        )


@dataclass(frozen=True, kw_only=True)
class Job(Subject):
    """Holds what every stage of a run needs."""

    config: RunConfig
    run: Run
    train: Prompts  # those that the reference answers
    heldout: Prompts  # those of the verdict's first look
    heldout_pool: Prompts  # those of all looks that the verdict may take, the first one's first
    pairs: ResponsePairs | None  # of a file, to learn from
    preferences: ResponsePairs | None  # of a file, to be scored by
    given: GivenSamples | None  # of the file of --samples, to the prompts of `train`
    samples: SharedSamples | None  # of the run of --samples-of


@contextmanager
def open_job(
    algorithm: str,
    config: RunConfig,
    resume: str | None,
    n_stages: int | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Job]:
    """Loads and checks everything, prints the plan, then creates or resumes the run folder.

    n_stages: how many stages the run will have, for the display; by default what the config says. ranks: of
    several, rank 0 alone prints and has the run folder.

    Raises: UserError before any compute is spent.
    """
    check(config)
    alike.check_ranks(algorithm, config, resume, ranks)
    ranks = ranks.arranged(config.model_ranks)
    prepare_process(config.threads, ranks)
    start = ranks.first(lambda: _start(algorithm, config, resume))
    alike.check_seen(ranks, start.out if start.owned is None else start.owned.run)
    prepared = _prepare(config, start, ranks)
    display = Display(n_stages=n_stages or stages_of(prepared.config), silent=not ranks.is_first)
    _announce(display, algorithm, prepared, resumes=start.resumes)
    # Weights that cannot be used are refused before there is a run folder.
    subject = None if start.resumes else prepared.subject()
    display.line(f"run folder {start.out}")

    def opened() -> Run:
        if start.resumes:
            return _resume(start, prepared, display)
        return _create(algorithm, start.out, prepared, display)

    with Run.on(ranks, opened, display) as run:
        if not start.resumes:
            alike.check_new(run)
        yield prepared.job(subject or prepared.subject(), run)


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run begins: anew, or with what an interrupted one has left."""

    out: Path
    resumes: bool
    owned: OwnedInputs | None  # the run's own inputs where it goes on, else those of the run of --samples-of
    damage: DamagedInputs | None  # of the run's own inputs, which then are read anew and restored
    now: datetime  # the time that a template may be told

    @property
    def goes_on(self) -> bool:
        """Tells whether the run has its own inputs, so that none are read from outside."""
        return self.resumes and self.damage is None


def _start(algorithm: str, config: RunConfig, resume: str | None) -> Start:
    """Finds the run's folder, and the inputs that it has or shares.

    Raises: UserError where a new run's folder exists, or there are no such inputs.
    """
    out = Path(resume or config.out or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-{algorithm}-seed{config.seed}")
    if resume is None and out.exists():
        raise UserError(f"run folder {out} exists; choose another --out, or go on with --resume {out}.")
    owned = damage = None
    if resume is not None:
        try:
            owned = owned_inputs(Path(resume))
        except DamagedInputs as error:
            damage = error
    if owned is None and config.samples_of:
        owned = owned_inputs(Path(config.samples_of))
    return Start(out=out, resumes=resume is not None, owned=owned, damage=damage, now=clock())


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a run needs, read and checked; the weights of its model are not loaded yet."""

    config: RunConfig  # with its data type, as many prompts as there are, and rows that the memory holds
    inputs: Inputs
    train: Prompts  # those that the reference answers
    heldout: Prompts  # those of the verdict's first look
    heldout_pool: Prompts  # those of all looks that the verdict may take
    pairs: ResponsePairs | None
    preferences: ResponsePairs | None
    scorers: Scorers
    samples: SharedSamples | None
    scorer_contents: dict[str, dict[str, str]]  # as `engine.scorers.find.content` gives them
    answers: Answers  # of judges behind HTTP
    plan: Plan
    asked_rows: int  # of --rollout-rows
    lowered: str  # says which numbers of prompts are lower than asked for; "" where none is
    passes: str  # says what --epochs comes to; "" without it
    warnings: list[str]  # of the scorers
    notes: list[str]  # say what has changed since the run began
    ranks: Ranks

    def record(self) -> RunInputs:
        """Returns what a run keeps of its inputs."""
        return RunInputs(
            train=self.inputs.train,
            heldout=self.inputs.heldout,
            pairs=self.pairs,
            preferences=self.preferences,
            samples=self.inputs.given if self.samples is None else None,
            reading=self.inputs.reading,
            began=self.inputs.began,
            sources=source_digests(self.config) | self.inputs.sources,
            model=self.inputs.files,
            scorers=self.scorer_contents,
            template=self.inputs.template,
        )

    def subject(self) -> Subject:
        """Loads the weights."""
        settings = SamplingSettings.of(self.config)
        return Subject.load(settings, self.inputs, self.scorers, self.ranks, self.plan.shards)

    def job(self, subject: Subject, run: Run) -> Job:
        """Returns what every stage needs."""
        given = None if self.samples is not None else self.inputs.given
        return Job(
            # What is written goes on with the run's own texts: --template is among them.
            **vars(subject) | {"texts": run.paths.model, "answers": self.answers},
            config=self.config,
            run=run,
            train=self.train,
            heldout=self.heldout,
            heldout_pool=self.heldout_pool,
            pairs=self.pairs,
            preferences=self.preferences,
            given=None if given is None else given.of(self.train),
            samples=self.samples,
        )


def _prepare(config: RunConfig, start: Start, ranks: Ranks) -> Prepared:
    """Reads and checks model, prompts, scorers and pairs. Raises: UserError."""
    owned = start.owned
    with ranks.node_first():
        inputs = read_inputs(config, owned, ranks, now=start.now)
    # Where auto means something else a run goes on, and is judged, in the data type that it began with.
    config = replace(config, dtype=str(inputs.dtype).removeprefix("torch."))
    if inputs.given is not None:
        config = replace(config, n_responses=inputs.given.rollouts.n)
    config, lowered = fit(config, len(inputs.train), len(inputs.heldout))
    # Check again: `fit` may have lowered the numbers of prompts below what a verdict needs.
    check(config)
    if config.samples_of and owned is not None:
        check_samples_of(config)
    pairs, passes = owned.record.pairs if start.goes_on else pairs_of(config, inputs), ""
    if pairs is not None:
        config, passes = with_steps(config, len(pairs.prompts))
    train = training_prompts(inputs.train, config.n_prompts, config.seed)
    looks = config.looks(len(inputs.heldout))
    pool = judged_prompts(config, inputs.heldout, looks[-1].prompts)
    heldout = pool.select(list(range(config.eval_prompts)))
    scorer_contents = content(config.reward, config.cost, config.audit, folder=inputs.folder)
    # Before anything is made of them, which would find fault with them in other words.
    alike.check_same_inputs(ranks, inputs, scorer_contents, [train, pool])
    samples = SharedSamples.of(config, scorer_contents) if config.samples_of else None
    known = None if samples is None else [place is not None for place in samples.places]
    if samples is None and inputs.given is not None:
        known = [name in inputs.given.names for name in scorer_contents]
    alike.check_shares(config, ranks, resumes=start.resumes)
    plan = _plan(config, inputs, train, heldout, known or (), ranks, resumes=start.resumes)
    asked_rows, config = config.rollout_rows, replace(config, rollout_rows=plan.rows)
    notes = list(inputs.notes)
    if owned is not None:
        compared = scorer_contents if start.goes_on else spelled_alike(config, scorer_contents, owned)
        notes += owned.check_scorers(compared, accept=config.accept_changes)
    answers = Answers()
    if start.resumes:
        answers.keep_in(RunFolder(start.out).judge_cache, read_only=not ranks.is_first)
    scorers = scorers_of(config, inputs, answers)
    scored = [train, heldout, *([] if pairs is None else [pairs.prompts])]
    names = [s.name for s in scorers.costs]
    limits = constraints.limits(config, names)
    constraints.check_prompts(limits, _judged_on(config, train, heldout))
    constraints.check_confirmable(limits, pool, last_error(len(looks)))
    preferences = owned.record.preferences if start.goes_on else preferences_of(config, names, inputs)
    if pairs is not None:
        constraints.check_prompts(limits, {f"rows of {config.pairs_file}": pairs.prompts})
    return Prepared(
        config=config,
        inputs=inputs,
        train=train,
        heldout=heldout,
        heldout_pool=pool,
        pairs=pairs,
        preferences=preferences,
        scorers=scorers,
        samples=samples,
        scorer_contents=scorer_contents,
        answers=answers,
        plan=plan,
        asked_rows=asked_rows,
        lowered=lowered,
        passes=passes,
        warnings=try_out(scorers, scored, config.max_new_tokens)
        + constraints.warnings(limits, pool)
        + alike.idle_warnings(config, ranks),
        notes=notes,
        ranks=ranks,
    )


def _plan(
    config: RunConfig,
    inputs: Inputs,
    train: Prompts,
    heldout: Prompts,
    known: Sequence[bool],
    ranks: Ranks,
    *,
    resumes: bool,
) -> Plan:
    """Plans time and memory, on all ranks alike. known: see `engine.scorers.find.sizes`. Raises: UserError
    where the memory of one does not suffice."""
    by_default = config.rollout_rows == RunConfig.rollout_rows
    if by_default and not resumes and inputs.device.type == "cuda":
        config = replace(config, rollout_rows=ROWS_ON_GPU)
    plan = Plan.of(
        config,
        inputs.shape,
        inputs.dtype,
        inputs.device,
        *([len(ids) for ids in prompts.token_ids] for prompts in (train, heldout)),
        scorers=sizes(
            config,
            folder=inputs.folder,
            trunk=inputs.fingerprint,
            dtype=inputs.dtype,
            device=inputs.device,
            known=known,
        ),
        # Fewer only where the user left the default; a resumed run has no flags, so there it is always fine.
        fewer_rows=resumes or by_default,
        ranks=ranks,
    )
    plans = ranks.gather(plan)
    for plan in plans:
        plan.check()
    return min(plans, key=lambda plan: plan.rows)


def _announce(display: Display, algorithm: str, prepared: Prepared, *, resumes: bool) -> None:
    """Says what the run is, what it takes, and what of its settings and files cannot be used as it is."""
    config, inputs, plan = prepared.config, prepared.inputs, prepared.plan
    display.line(
        f"{shown_name(algorithm)} on {config.model or DEFAULT_MODEL} "
        f"({inputs.shape.parameter_count() / 1e6:.0f}M weights, {inputs.dtype}, {inputs.device})"
    )
    if prepared.lowered:
        there = f"{len(inputs.train)} training and {len(inputs.heldout)} held-out prompts are there"
        display.line(f"{there}, so {prepared.lowered}")
    for warning in prepared.warnings:
        display.warn(warning)
    if config.truncated:
        display.warn(
            f"with {config.cut_by} the distributions that are sampled are cut, so no KL is measured: in its "
            "place stands the mean log-ratio of the whole policies on these samples"
        )
    files = [own for own in (prepared.pairs, prepared.preferences) if own is not None]
    for lines in [] if resumes else (inputs.reading, *(own.reading for own in files)):
        for line in lines:
            display.line(line)
    for own in files if inputs.given is None else [inputs.given, *files]:
        for note in own.notes():
            display.warn(note)
    if prepared.passes:
        display.line(prepared.passes)
    display.line(plan.sentence())
    first, *further = config.looks(len(prepared.heldout_pool))
    if further:
        display.line(
            f"verdict: after {first} it looks again, at {' and then '.join(map(str, further))}, while a "
            "constraint is neither met nor not met (--eval-budget)"
        )
    if plan.rows < prepared.asked_rows:
        display.line(f"memory is short, so --rollout-rows is {plan.rows}")


def _create(algorithm: str, out: Path, prepared: Prepared, display: Display) -> Run:
    """Makes the run folder. Raises: UserError."""
    config, inputs = prepared.config, prepared.inputs
    run = Run.create(
        out,
        algorithm,
        {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_THE_COMMAND},
        versions=alike.versions(prepared.ranks),
        fingerprint=inputs.fingerprint,
        inputs=prepared.record(),
        model_files=copies(inputs.texts, inputs.files, inputs.template),
        display=display,
    )
    prepared.answers.keep_in(run.paths.judge_cache)
    for note in prepared.notes:
        display.warn(note)
    return run


def _resume(start: Start, prepared: Prepared, display: Display) -> Run:
    """Opens the run folder, and restores its inputs where they are damaged. Raises: UserError."""
    owned, inputs, notes = start.owned, prepared.inputs, list(prepared.notes)
    if start.damage is not None:
        owned = restore_inputs(start.out, read_contents(start.out), prepared.record(), start.damage)
        notes.append(f"{start.damage.what}: restored from what the run was made from")
        notes += owned.check_model(inputs.folder, inputs.files)
    run = Run.resume(start.out, fingerprint=inputs.fingerprint, display=display)
    owned.accept(prepared.scorer_contents)
    if run.versions != (here := alike.versions(prepared.ranks)):
        changed = sorted(k for k in here | run.versions if here.get(k) != run.versions.get(k))
        display.warn(
            f"resumed with other versions of {', '.join(changed)}: results may differ in the last bits"
        )
    for note in notes:
        display.warn(note)
    return run


def training_prompts(train: Prompts, n: int, seed: int) -> Prompts:
    """Chooses the n training prompts of a run, a seeded subset."""
    return train.select(subset(train, n, seed, keys.TRAINING_PROMPTS))


def heldout_prompts(heldout: Prompts, n: int, seed: int, *, shipped: bool = False) -> Prompts:
    """Chooses the n prompts of a verdict, a seeded subset.

    shipped: they are the project's own, of which those of the first look come first.
    """
    first = first_look(heldout) if shipped else set()
    return heldout.select(subset(heldout, n, seed, keys.HELDOUT_PROMPTS, first))


def judged_prompts(config: RunConfig, heldout: Prompts, n: int) -> Prompts:
    """Chooses n of the prompts of a run's own verdict, or all where there are fewer; a larger n adds to a
    smaller one."""
    n = min(n, len(heldout))
    return heldout_prompts(heldout, n, config.seed, shipped=config.judged_on_shipped)


def deal_prompts(config: RunConfig, prompts: Prompts, iteration: int) -> tuple[list[int], list[int]]:
    """Prompts for the pairs and for the slack of an iteration, see `engine.data.dealing.deal`."""
    n_pairs = config.steps * config.prompts_per_step
    return deal(prompts, config.seed, max(1, iteration), n_pairs, config.slack_prompts)


def _judged_on(config: RunConfig, reference: Prompts, heldout: Prompts) -> dict[str, Prompts]:
    """Lists the sets of prompts on which constraints will be measured, by what they are called."""
    sets = {"training prompts": reference, "held-out prompts": heldout}
    if config.measured_slacks:
        for t in range(1, config.policy_updates + 1):
            sets[f"slack prompts of iteration {t} (see --slack-prompts)"] = reference.select(
                deal_prompts(config, reference, t)[1]
            )
    return sets
