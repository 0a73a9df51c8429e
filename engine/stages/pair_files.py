"""The files of pairs that a run learns from or is scored by, --pairs and --preferences, without the rows
whose prompts are held out."""

from engine import keys
from engine.config import RunConfig
from engine.data.dealing import subset
from engine.data.prompts import assert_disjoint, by_tokens, overlap
from engine.data.response_pairs import ResponsePairs, read_response_pairs
from engine.records import Prompts
from engine.stages.inputs import Inputs, rules_of


def pairs_of(config: RunConfig, inputs: Inputs) -> ResponsePairs | None:
    """Reads the data of --pairs, all of it where --epochs counts passes, else as many rows as the steps take,
    as each is scored; None without. Raises: UserError."""
    if not (source := config.pairs_file):
        return None
    enough = None if config.epochs else config.policy_updates * config.steps * config.prompts_per_step
    own = read_response_pairs(
        source, [], inputs.tokenizer, inputs.limits, rules_of(config, inputs.folder, enough)
    )
    own = _without_heldout(config, own, inputs.heldout, "--pairs")
    if enough is None or len(own.prompts) <= enough:
        return own
    kept = set(subset(by_tokens(own.prompts), enough, config.seed, keys.PAIRS))
    return own.without(
        [row for row in range(len(own.prompts)) if row not in kept], "more than the steps take"
    )


def preferences_of(config: RunConfig, names: list[str], inputs: Inputs) -> ResponsePairs | None:
    """Reads the data of --preferences; None where the run is not scored by any. Raises: UserError."""
    if not (config.by_preference and config.preferences):
        return None
    rules = rules_of(config, inputs.folder, config.preference_steps * config.prompts_per_step)
    columns = config.preference_columns or ("reward", *names)
    own = read_response_pairs(config.preferences, columns, inputs.tokenizer, inputs.limits, rules)
    return _without_heldout(config, own, inputs.heldout, "--preferences")


def _without_heldout(config: RunConfig, own: ResponsePairs, heldout: Prompts, flag: str) -> ResponsePairs:
    """Leaves the rows out whose prompts are held out; --strict refuses them. Raises: UserError."""
    prompts = by_tokens(own.prompts)
    if config.strict:
        assert_disjoint(prompts, heldout, f"prompt of {flag}")
    shared = overlap(prompts, heldout)
    return own.without(shared, "with a held-out prompt") if shared else own
