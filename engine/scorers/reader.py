"""Writes a conversation and its answer as a model that scores them reads them.

A text is written whole and tokenised whole: where a response begins, tokens may straddle the place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

from engine.data.chat import as_text, render
from engine.data.formats import first_line
from engine.errors import UserError
from engine.scorers.base import Asked, messages_of
from engine.scorers.recipes import Recipe

LONGEST_TEXT = 4096
_TRIAL = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": "An answer"}]


@dataclass(kw_only=True)
class Reader:
    """Writes and tokenises the texts of one scorer, and counts those that it cuts."""

    spec: str
    tokenizer: Any
    max_tokens: int
    now: datetime | None
    recipe: Recipe
    n_read: int = 0  # texts since the last warning
    n_cut: int = 0  # those of them that were too long
    in_parts: bool = False  # the chat template reads a content as a list of parts

    def __post_init__(self) -> None:
        if self.recipe.text is None and self.chat:
            self.in_parts = self._takes_parts()

    @property
    def chat(self) -> bool:
        """Tells whether texts are written by a chat template, else as a pair or a response alone."""
        return self.recipe.template and bool(self.recipe.text or self.tokenizer.chat_template)

    def texts(self, prompts: Sequence[Asked], responses: Sequence[str]) -> list[str]:
        """Writes each conversation with its response; without a chat template, only the prompt.

        Raises: UserError where the template refuses a conversation.
        """
        if not self.chat:
            return [self._prompt(prompt) for prompt in prompts]
        return [self.written(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def encode(
        self,
        prompts: Sequence[Asked],
        responses: Sequence[str],
        texts: Sequence[str] | None = None,
        *,
        counted: bool = True,
    ) -> dict[str, list[list[int]]]:
        """Tokenises each prompt with its response: by the chat template, else as a pair of texts.

        texts: what `texts` wrote, and more behind it. counted: `warnings` counts these. Of what is too long
        the start of the prompt is cut, never the response.
        Raises: UserError where a response alone is too long, or the template refuses a conversation.
        """
        texts = list(texts or self.texts(prompts, responses))
        if self.chat:
            inputs = dict(self.tokenizer(texts, add_special_tokens=False, verbose=False))
        elif self.recipe.alone:
            inputs = dict(self.tokenizer(list(responses), verbose=False))
        else:
            inputs = dict(self.tokenizer(texts, list(responses), verbose=False))
        self.n_read += counted * len(texts)
        for i, ids in enumerate(inputs["input_ids"]):
            if not ids and self.tokenizer.eos_token_id is not None:
                # An empty response is read as its end alone, where the tokenizer puts nothing around texts.
                end = self.tokenizer(self.tokenizer.eos_token, add_special_tokens=False, verbose=False)
                for name, values in end.items():
                    inputs[name][i] = values
            elif not ids:
                raise UserError(
                    f"scorer {self.spec}: the response {responses[i][:60]!r} has no tokens for it; "
                    "use another scorer."
                )
            if len(ids) > self.max_tokens:
                self.n_cut += counted
                for name, values in self._cut(texts[i], prompts[i], responses[i]).items():
                    inputs[name][i] = values
        return inputs

    def written(self, prompt: Asked, response: str | None) -> str:
        """Writes one conversation, with its response unless that is None. Raises: UserError as `texts`."""
        try:
            return self._rendered(messages_of(prompt), response)
        except Exception as error:
            raise UserError(
                f"scorer {self.spec}: its chat template refuses the prompt {str(prompt)[:60]!r} "
                f"({first_line(error)}); give other prompts or another scorer."
            ) from error

    def _prompt(self, prompt: Asked) -> str:
        """Writes the prompt of a pair. Raises: UserError as `texts`."""
        messages, template = messages_of(prompt), self.recipe.prompt
        if template is None:
            return as_text(messages)
        try:
            return render(messages, self.tokenizer, self.now, {"chat_template": template})
        except Exception as error:
            raise UserError(
                f"scorer {self.spec}: its recipe refuses the prompt {str(prompt)[:60]!r} "
                f"({first_line(error)}); give other prompts or another scorer."
            ) from error

    def warnings(self) -> list[str]:
        """Says how many texts were cut since the last call."""
        n_read, n_cut, self.n_read, self.n_cut = self.n_read, self.n_cut, 0, 0
        if not n_cut:
            return []
        return [
            f"scorer {self.spec} reads {self.max_tokens} tokens: the prompt's start was cut in {n_cut} of "
            f"{n_read} texts"
        ]

    def _rendered(self, messages: list[dict], response: str | None) -> str:
        recipe, options = self.recipe, dict(self.recipe.options)
        if response is not None:
            messages = [*messages, {"role": "assistant", "content": response}]
        if recipe.text is not None:
            texts = {"prompt": as_text(messages[:-1] or messages), "response": response or ""}
            options |= {"chat_template": recipe.text, **texts}
        if recipe.asks:
            asked = render(messages, self.tokenizer, self.now, options, answered=True)
            messages, options = [{"role": "user", "content": asked}], dict(recipe.options)
        if self.in_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages
            ]
        return render(messages, self.tokenizer, self.now, options, answered=not recipe.generation_prompt)

    def _takes_parts(self) -> bool:
        """Tells whether the chat template writes contents that are lists of parts, and none that are texts.

        Raises: UserError where it writes neither.
        """
        for self.in_parts in (False, True):
            try:
                text = self._rendered(_TRIAL[:1], _TRIAL[1]["content"])
            except Exception as error:
                reason = first_line(error)
            else:
                if all(message["content"] in text for message in _TRIAL):
                    return self.in_parts
                reason = "it leaves out what the two say"
        raise UserError(
            f"scorer {self.spec}: its chat template refuses a question with an answer ({reason}); "
            "use another scorer or recipe."
        )

    def _cut(self, text: str, prompt: Asked, response: str) -> dict[str, list[int]]:
        """Leaves out the start of the prompt in a text that is too long."""
        if not self.chat:
            return self._cut_pair(text, response)
        inputs = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = inputs["input_ids"]
        # What a guard is asked stands before the conversation, and stays.
        start = int(ids[0] == self.tokenizer.bos_token_id)
        if self.recipe.steps:
            other = [{**message, "content": _unlike(message["content"])} for message in messages_of(prompt)]
            start = self._tokens_before(text, self.written(other, response))
        answer = len(ids) - self._tokens_before(text, self.written(prompt, _unlike(response)))
        self._check_answer(start + answer, response)
        kept = len(ids) - self.max_tokens + start
        return {name: [*values[:start], *values[kept:]] for name, values in inputs.items()}

    def _tokens_before(self, text: str, other: str) -> int:
        """Counts the tokens of what two texts begin with."""
        common = commonprefix([text, other])
        return len(self.tokenizer.encode(common, add_special_tokens=False, verbose=False))

    def _cut_pair(self, text: str, response: str) -> dict[str, list[int]]:
        alone = (response,) if self.recipe.alone else ("", response)
        self._check_answer(len(self.tokenizer(*alone, verbose=False)["input_ids"]), response)
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            return dict(self.tokenizer(text, response, truncation="only_first", max_length=self.max_tokens))
        finally:
            self.tokenizer.truncation_side = side

    def _check_answer(self, n_tokens: int, response: str) -> None:
        if n_tokens >= self.max_tokens:
            asked = "with what it is asked " if self.recipe.steps else ""
            raise UserError(
                f"scorer {self.spec} reads {self.max_tokens} tokens, the response {response[:60]!r} {asked}"
                f"has {n_tokens}; lower --max-new-tokens or use another scorer."
            )


def _unlike(text: str) -> str:
    """Returns a text that differs from the first character on that is no white space."""
    return "B" if text.strip().startswith("A") else "A"
