"""Linear heads: where their files are, and heads that read another model than the policy's."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from engine import quickstart
from engine.data.chat import answer_ids, known_end_of_turn, lead_of_answers, write_prompt
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.folder import fingerprint, load, read_config
from engine.model.packing import Group
from engine.model.tokenizer import load_tokenizer
from engine.policy.forward import frozen_forward
from engine.scorers.base import Asked, Head, LastForward, LoadContext, TextScorer, messages_of

SHIPPED = Path(str(files("engine"))) / "assets" / "heads"


def find_head(spec: str, policy_folder: Path) -> Path | None:
    """Finds the folder of the head that `spec` names: in the policy's folder under heads/, shipped,
    or a head folder.

    Returns None where there is none of that name.
    """
    for folder in (policy_folder / "heads" / spec, SHIPPED / spec, Path(spec)):
        if (folder / "head.safetensors").is_file():
            return folder
    return None


def shipped_heads() -> list[str]:
    """Lists the names of the shipped heads."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/head.safetensors"))


def load_head(head: Head, context: LoadContext, policy_folder: Path) -> Head | TextScorer:
    """Returns the head itself where its trunk is the policy's model, else a scorer of texts.

    The scorer reads the texts with the head's trunk, in one forward pass for all heads on that trunk.
    Raises: UserError where the trunk is neither the policy's checkpoint nor the quickstart model, or the head
    does not fit it.
    """
    if head.trunk == context.trunk:
        head.check_fits(ModelConfig.from_json(read_config(policy_folder), policy_folder / "config.json"))
        return head
    if head.trunk not in context.loaded:
        context.loaded[head.trunk] = _load_trunk(head, context)
    trunk = context.loaded[head.trunk]
    head.check_fits(trunk.config)
    trunk.layers.add(head.layer)
    return TextScorer(
        name=head.name,
        function=lambda prompts, responses: head(trunk.states(prompts, responses)[head.layer]).tolist(),
        reads_messages=True,
    )


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A model that heads read beside the policy's."""

    states: LastForward  # (prompts, responses) -> {layer: mean states of each response [N, D]}
    config: ModelConfig
    layers: set[int]  # the layers that the heads loaded so far read


def _load_trunk(head: Head, context: LoadContext) -> Trunk:
    folder = quickstart.model_folder()
    if fingerprint(folder) != head.trunk:
        raise UserError(
            f"head {head.name} was made for another model (fingerprint {head.trunk}); "
            "use it with --model of that model."
        )
    model, tokenizer = load(folder, dtype=torch.float32, device=context.device), load_tokenizer(folder)
    end = known_end_of_turn(tokenizer, model.config.vocab_size, str(folder))
    lead, layers = lead_of_answers(tokenizer), set()

    def group(prompt: Asked, response: str, row: int) -> Group:
        written = write_prompt(messages_of(prompt), tokenizer, "", "prompt", context.now)
        answer = answer_ids(written, response, tokenizer, lead, f"head {head.name}")
        return Group(written.token_ids, [[*answer, end]], [row])

    def states(prompts: list[Asked], responses: list[str]) -> dict[int, Tensor]:
        turns = zip(prompts, responses, strict=True)
        groups = [group(prompt, response, row) for row, (prompt, response) in enumerate(turns)]
        longest = max(group.tokens for group in groups)
        if longest > model.config.max_positions:
            raise UserError(
                f"head {head.name} reads {model.config.max_positions} tokens, a prompt with its response has "
                f"{longest}; shorten the prompts or use another scorer."
            )
        return frozen_forward(model, groups, sorted(layers), temperature=None)[0]

    return Trunk(states=LastForward(states), config=model.config, layers=layers)
