"""The settings that all algorithms share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every algorithm needs: model, scorers, prompts, sampling, the constraint and the evaluation."""

    out: str = ""
    """Run folder, must not exist yet. Default: runs/DATE-ALGORITHM-seedSEED."""
    seed: int = 0
    """Seed of all random numbers: equal seeds give bitwise equal runs on one machine."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto (float32 on CPU, bfloat16 on a GPU), float32, bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0 takes as many as the process may use cores. Equal runs need equal thread counts."""
    force: bool = False
    """Go on with thresholds beyond what the samples support."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the package tensorboard)."""

    model: str = ""
    """Local Hugging Face folder or hub id of the policy. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    reward: str = "helpfulness"
    """Reward: a shipped head (helpfulness), a head folder, a sequence-classification model, or module:function; NAME=, NAME=- as --cost."""
    cost: tuple[str, ...] = ("harm",)
    """Costs, smaller is better: shipped head (harm), head folder, sequence-classification model, or module:function. NAME=COST gives a
    name, and NAME=-COST takes the negative of a score of which larger is better."""
    audit: tuple[str, ...] = ("harm-audit",)
    """Costs that are reported and never optimised. Same forms as --cost."""

    prompts: str = ""
    """Training prompts: jsonl, csv or parquet file, or a `datasets` name. Default: the project's own."""
    heldout: str = ""
    """Held-out prompts, same forms. Default: the project's own, or a seeded fifth of --prompts."""
    prompt_column: str = "prompt"
    """Column with the prompt text or the chat messages."""
    system: str = "Answer in one sentence of at most 15 words."
    """System line put before every prompt; empty leaves the chat template's own. Ignored by a tokenizer without a template."""

    samples_of: str = ""
    """Take the reference's samples, for training and for the verdict, from this run with equal settings instead of drawing them again."""
    n_prompts: int = 400
    """Training prompts sampled from the reference, at most: a seeded subset."""
    n_responses: int = 8
    """Responses per prompt (G)."""
    max_new_tokens: int = 48
    """Longest response, in tokens."""
    temperature: float = 0.7
    """Sampling temperature; it defines the policy, so log-probs use it too."""
    top_p: float = 1.0
    """Nucleus mass; 1 is off."""
    rollout_rows: int = 384
    """Responses decoded side by side; the default is lowered where memory is short. Samples do not depend on it, but for rounding."""

    threshold: tuple[float, ...] = (0.3,)
    """b: required improvement of each utility over the reference, in its within-prompt standard deviations."""
    cost_mean: tuple[float, ...] = ()
    """Largest mean of each cost, in the scorer's own units, instead of --threshold; inf for a cost that keeps --threshold."""
    cost_rate: tuple[float, ...] = ()
    """Largest share of unsafe responses in each cost, such as 0.02, instead of --threshold; 1 for a cost that keeps --threshold."""
    unsafe_above: tuple[float, ...] = (0.0,)
    """A response is unsafe where a cost lies above this, in the scorer's own units: one value, or one per cost."""
    cost_on: tuple[str, ...] = ()
    """Kind of prompts (the column kind) that each constraint is about, such as delicate: its mean runs over these. all, the default, is
    every prompt."""
    beta: float = 1.0
    """Weight of KL(policy || reference), in units of the scaled reward."""
    margin: float = 3.3
    """The dual aims at b + margin x the standard error predicted for the held-out set; 0 is the papers' method."""
    lam_max: float = 20.0
    """Upper bound of each multiplier, in scaled units."""

    steps: int = 5
    """Policy steps per iteration."""
    prompts_per_step: int = 16
    """Prompts in one policy step, at most."""
    tokens_per_forward: int = 16384
    """Most tokens of one forward and backward pass of a policy step, prompts counted once; a larger step adds up the gradients of parts."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again: less memory, about a third more time."""
    responses_per_prompt: int = 2
    """Responses of each prompt in a policy step, the most and the least preferred of the G; all their pairs are used. 0 takes all G, which
    fits the tilt itself; the two ends act like a smaller --beta."""
    labels: str = "regression"
    """regression (least squares of margins on score differences), soft (expected Bradley-Terry label), sampled (a random draw of it, as in
    the papers), listwise (cross-entropy over a prompt's responses) or single (least squares of each response, DRO)."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of AdamW. The default is for adapters; --tune full wants one of about 1e-5."""
    warmup_steps: int = 1
    """Linear warm-up at the start of the run, in steps."""
    schedule: str = "constant"
    """Learning rate after the warm-up: constant, or linear or cosine: down to 0 over the steps of each policy update, which starts at the
    peak again."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    tune: str = "lora"
    """lora: train an adapter on the frozen model. full: train all weights; each iterate is a whole checkpoint, --checkpoint-every
    writes 12 bytes for every weight, and the --lora flags say nothing."""
    lora_rank: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_from: float = 0.5
    """The adapter sits on the layers from this share of the depth on; the layers below are computed once per sample."""
    memory_budget_mb: int = 0
    """Bound on the loss head's working memory, in MiB; 0 is 256 on a CPU and 4096 on a GPU."""
    checkpoint_every: int = 2
    """Policy steps between checkpoints inside an iteration."""

    eval_prompts: int = 96
    """Held-out prompts in the verdict, at most."""
    eval_responses: int = 6
    """Responses per held-out prompt."""

    @property
    def memory_budget_bytes(self) -> int | None:
        """Of the loss head, as the ops of `kernels` take it: None is their default for the device."""
        return self.memory_budget_mb * 2**20 or None


@dataclass(frozen=True, kw_only=True)
class IterativeConfig(RunConfig):
    """What algorithms need that measure the slack of their policies and descend the dual."""

    iterations: int = 5
    """T: policies trained; a dual step stands between two of them."""
    slack_prompts: int = 64
    """Prompts on which the slack is measured, never among the iteration's pairs; at most a third where prompts are few."""
    slack_responses: int = 3
    """Responses per prompt in the slack."""
    lam_max_change: float = 2.0
    """Largest factor by which a multiplier may change in one dual step."""
    max_kl: float = float("inf")
    """Stop when KL(policy || reference) passes this many nats per response, keeping the last iterate below it."""
