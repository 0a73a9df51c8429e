"""The prompts that come with the project, tokenised once in each process."""

from collections.abc import Callable
from pathlib import Path

from engine.data.prompts import lookalike_prompts
from engine.data.reading import Rules
from engine.records import Prompts

SHIPPED = Path(lookalike_prompts()).parent


def remembered(read: Callable) -> Callable:
    """Returns `engine.data.prompts.read_prompts` with a memory of what it gave of the shipped prompts.

    It goes by the tokenizer, the rules and the settings.
    """
    known: dict[tuple, tuple[Prompts, list[str]]] = {}

    def reading(source: str | list[str], tokenizer, rules: Rules, **settings) -> tuple[Prompts, list[str]]:
        names = [source] if isinstance(source, str) else source
        # A template that writes the date gives other prompts each day.
        dated = "strftime_now" in str(tokenizer.chat_template)
        if dated or any(Path(name).parent != SHIPPED for name in names):
            return read(source, tokenizer, rules, **settings)
        template = str(tokenizer.chat_template), tokenizer.backend_tokenizer.to_str()
        settings_text = repr({name: value for name, value in settings.items() if name != "now"})
        key = *names, *template, repr(rules), settings_text
        if key not in known:
            known[key] = read(source, tokenizer, rules, **settings)
        prompts, said = known[key]
        return prompts, [*said]

    return reading
