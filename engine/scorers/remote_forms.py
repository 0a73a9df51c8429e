"""How judges behind HTTP are named and asked, and how a score is read from what they answer.

    http://HOST/PATH              a reward server with the interface of OpenRLHF: {"query": texts, "prompts":
                                  texts, "labels": texts} is answered by {"rewards": numbers}. Texts are those
                                  that the policy reads and writes, with its template and special tokens; a
                                  query is a prompt and its response. Labels are empty.
    http://HOST/v1#MODEL@RECIPE   a model behind an OpenAI-compatible server. The recipe of a guard gives
                                  log-odds from the log-probs of its answers, as for the same model in a
                                  folder; number reads a number from the text, for judges that reason.

A recipe may be left out where the model's name says it. `number` asks for a rating from 0 to 10 of how well
the response answers; `number:FILE` asks what a jinja file says, which uses {{ prompt }} and {{ response }}.
The number has to stand alone on the last line that has one, as in "Score: 7" or "7/10".
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.data.chat import as_text, write_prompt
from engine.errors import UserError
from engine.files import escaped, one_line, reading, shown
from engine.scorers.base import Asked, LoadContext, Sampled, messages_of
from engine.scorers.recipes import RECIPES, Recipe, Step, recipe_of_folder

# Those of guards that are asked through the model's own chat template, which the server has.
GUARDS = [name for name, recipe in RECIPES.items() if recipe.steps and (recipe.text is None or recipe.asks)]
NUMBER = "number"
RATING = """\
Rate how well the last response answers, from 0 (useless or wrong) to 10 (nothing to add).

The conversation:
{{ prompt }}

The response:
{{ response }}

Think as long as you need. End with a line that holds the rating alone, such as "Score: 7"."""
GUARD_TOKENS = 48  # of a guard's answer, up to the last of its steps
_NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?!\w|\.\d)"
_SCALE = re.compile(rf"({_NUMBER})\s*\(?(?:/|out of)\s*\d+(?:\.\d+)?")


class BadAnswer(ValueError):
    """What a judge has answered holds no score. The message says what it holds."""


class RemoteSpec(NamedTuple):
    """A judge behind HTTP as a scorer: URL or URL#MODEL@RECIPE."""

    url: str
    model: str = ""
    recipe: str = ""

    @staticmethod
    def of(spec: str) -> "RemoteSpec":
        """Reads a scorer's value. Raises: UserError for one that is no such thing."""
        url, _, rest = spec.partition("#")
        model, at, recipe = rest.rpartition("@") if "@" in rest else (rest, "", "")
        try:
            parts = urlsplit(url)
            known = bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise UserError(f"scorer {spec:.100}: no address of a server; give http://HOST:PORT/PATH.")
        if "@" in url or "?" in url:
            # What stands there may be a secret, and would be kept in config.json.
            raise UserError(
                f"scorer {parts.scheme}://{parts.hostname}: an address with @ or ? would keep what may be a "
                "key in the run folder; give it without, a key in OPENAI_API_KEY, and MODEL@RECIPE behind #."
            )
        if "#" in spec and not model:
            raise UserError(f"scorer {spec}: no model behind #; give {url}#MODEL@RECIPE.")
        if model and not recipe and not at:
            recipe = recipe_of_folder(model.rpartition("/")[2])
        found = RemoteSpec(url.rstrip("/"), model, recipe)
        if model and not (recipe in GUARDS or recipe.partition(":")[0] == NUMBER):
            said = f"the recipe {recipe} is not for a server" if recipe else "nothing says what is read"
            raise UserError(
                f"scorer {spec}: {said}; give {url}#{model}@RECIPE, one of {', '.join(GUARDS)}, {NUMBER} and "
                f"{NUMBER}:FILE."
            )
        return found

    @property
    def name(self) -> str:
        """The name of the scorer where the user gives none."""
        parts = urlsplit(self.url)
        return (self.model or parts.path.strip("/") or parts.netloc).rpartition("/")[2]

    @property
    def file(self) -> Path | None:
        """The file of number:FILE."""
        _, _, file = self.recipe.partition(":")
        return Path(file) if file and self.recipe.startswith(f"{NUMBER}:") else None

    def files(self) -> tuple[str, dict[str, Path]]:
        """Returns the address, and by name the file that the scorer depends on."""
        return self.url, {self.file.name: self.file} if self.file else {}


def is_remote(spec: str) -> bool:
    """Tells whether a scorer's value is an address."""
    return spec.lower().startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class RewardServer:
    """OpenRLHF's form: many texts in one request."""

    context: LoadContext
    at_once: int = 32  # texts in a request

    def url(self, spec: RemoteSpec) -> str:
        """Returns the address that requests go to."""
        return spec.url

    def items(self, prompts: Sequence[Asked], responses: list[str], sampled: Sampled | None) -> list[Any]:
        """Returns (query, prompt) of each response."""
        tokenizer, limits = self.context.tokenizer, self.context.limits
        assert tokenizer is not None and limits is not None, "a reward server is given the policy's own texts"
        items = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if sampled is None:
                messages, kwargs = messages_of(prompt), limits.template_kwargs
                asked = write_prompt(
                    messages, tokenizer, limits.system, "a prompt", limits.now, kwargs
                ).token_ids
                answer = tokenizer.encode(response, add_special_tokens=False)
            else:
                asked, answer = sampled.prompt_ids[row], sampled.response_ids[row]
            items.append((tokenizer.decode([*asked, *answer]), tokenizer.decode(asked)))
        return items

    def body(self, items: Sequence[Any]) -> dict:
        """Returns a request for some items."""
        queries, prompts = map(list, zip(*items, strict=True))
        return {"query": queries, "prompts": prompts, "labels": [""] * len(items)}

    def read(self, answer: Any, items: Sequence[Any]) -> list[float]:
        """Reads the scores of some items. Raises: BadAnswer."""
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise BadAnswer(f"no list of rewards in {_short(answer)}")
        if len(rewards) != len(items):
            raise BadAnswer(f"{len(rewards)} rewards for {len(items)} texts")
        for reward, (query, _) in zip(rewards, items, strict=True):
            if isinstance(reward, bool) or not isinstance(reward, Real) or not math.isfinite(reward):
                raise BadAnswer(f"the reward {_short(reward)} for {_end(query)}")
        return [float(reward) for reward in rewards]

    def warnings(self) -> list[str]:
        """Says nothing: whatever is read is the server's own number."""
        return []


@dataclass(kw_only=True)
class ChatModel:
    """Chat completions: a request for each response."""

    spec: RemoteSpec
    recipe: Recipe | None  # of a guard; None where a number is read
    text: str = ""  # a jinja template of what is asked; "" where the guard's own says it
    at_once: int = 1
    n_read: int = field(default=0)  # answers since the last warning
    n_bounded: int = field(default=0)  # those of them in which one side was not among the log-probs

    @staticmethod
    def of(spec: RemoteSpec) -> "ChatModel":
        """Finds what a recipe asks. Raises: UserError where FILE cannot be read, or is no template."""
        if spec.recipe in GUARDS:
            recipe = RECIPES[spec.recipe]
            return ChatModel(spec=spec, recipe=recipe, text=recipe.text or "")
        text = RATING
        if spec.file is not None:
            with reading(spec.file, cure=f"give a jinja file to @{NUMBER}:FILE"):
                text = spec.file.read_text(encoding="utf-8")
            written = [_written(text, {"prompt": a, "response": b}, spec) for a, b in ("ab", "cb", "ad")]
            if len(set(written)) < 3:
                raise UserError(
                    f"{shown(spec.file)}: it asks the same of all responses; use {{{{ prompt }}}} and "
                    "{{ response }} in it."
                )
        return ChatModel(spec=spec, recipe=None, text=text)

    def url(self, spec: RemoteSpec) -> str:
        """Returns the address that requests go to."""
        return f"{spec.url}/chat/completions"

    def items(self, prompts: Sequence[Asked], responses: list[str], sampled: Sampled | None) -> list[Any]:
        """Returns the request for each response."""
        return [self._asked(messages_of(p), r) for p, r in zip(prompts, responses, strict=True)]

    def body(self, items: Sequence[Any]) -> dict:
        """Returns the request for one item."""
        (item,) = items
        return item

    def read(self, answer: Any, items: Sequence[Any]) -> list[float]:
        """Reads the score of one item. Raises: BadAnswer."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise BadAnswer(f"no choices[0].message.content in {_short(answer)}") from None
        self.n_read += 1
        if self.recipe is None:
            if choice.get("finish_reason") == "length":
                raise BadAnswer(f"a text that was cut off at {_end(text or '')}")
            number = number_in(text or "")
            if number is None:
                raise BadAnswer(f"no single number on the last line that has one: {_end(text or '')}")
            return [number]
        try:
            tokens = [
                (token["token"], {top["token"]: float(top["logprob"]) for top in token["top_logprobs"]})
                for token in choice["logprobs"]["content"]
            ]
        except (KeyError, TypeError, ValueError):
            raise BadAnswer(
                f"no log-probs beside the text {_short(text)}; a model without them is read by @{NUMBER}"
            ) from None
        score, bounded = log_odds(tokens, self.recipe.steps)
        self.n_bounded += bounded
        return [score]

    def warnings(self) -> list[str]:
        """Says in how many answers since the last call a score is a bound."""
        n_read, n_bounded, self.n_read, self.n_bounded = self.n_read, self.n_bounded, 0, 0
        if not n_bounded:
            return []
        return [
            f"scorer {self.spec.url}#{self.spec.model}: in {n_bounded} of {n_read} answers only the good or "
            "only the bad one is among the log-probs that it gives; the other one counts as the least likely "
            "of these"
        ]

    def _asked(self, messages: list[dict[str, str]], response: str) -> dict:
        if self.text:
            texts = {"prompt": as_text(messages), "response": response}
            asked = [{"role": "user", "content": _written(self.text, texts, self.spec)}]
        else:
            asked = [*messages, {"role": "assistant", "content": response}]
        body = {"model": self.spec.model, "messages": asked, "temperature": 0}
        if self.recipe is None:
            return body
        body |= {"max_tokens": GUARD_TOKENS, "logprobs": True, "top_logprobs": 20}
        # Not of OpenAI, but of the servers that guards run on.
        if not self.recipe.generation_prompt:
            body["add_generation_prompt"] = False
        if self.recipe.options:
            body["chat_template_kwargs"] = dict(self.recipe.options)
        return body


def number_in(text: str) -> float | None:
    """Reads the number on the last line that has one, "7/10" and "7 out of 10" as 7; None where there is no
    such line, or more than one number on it."""
    lines = [line for line in text.splitlines() if re.search(r"\d", line)]
    numbers = re.findall(_NUMBER, _SCALE.sub(r"\1", lines[-1])) if lines else []
    return float(numbers[0]) if len(numbers) == 1 and math.isfinite(float(numbers[0])) else None


def log_odds(tokens: list[tuple[str, dict[str, float]]], steps: Sequence[Step]) -> tuple[float, bool]:
    """Reads the log-odds of the bad answers of the last step.

    tokens: of what was generated, each with the log-probs of the likeliest tokens at its place. A token
    counts for an answer that begins with it, white space aside. An answer that is not among them counts as
    the least likely of them.
    Returns them, and whether they are such a bound. Raises: BadAnswer where a step is not reached, or none of
    its answers is likely.
    """
    place = 0
    for step in steps:
        written, prefix = "", step.prefix.strip()
        while place < len(tokens) and not (written.rstrip().endswith(prefix) and tokens[place][0].strip()):
            written += tokens[place][0]
            place += 1
        if place == len(tokens):
            text = "".join(token for token, _ in tokens)
            raise BadAnswer(f"{_short(text)}, which is no answer of its recipe")
        token, likely = tokens[place]
        place += 1
    bad = [x for t, x in likely.items() if _begins(t, step.bad) and not _begins(t, step.good)]
    good = [x for t, x in likely.items() if _begins(t, step.good) and not _begins(t, step.bad)]
    if not (bad or good):
        answers = ", ".join(answer.strip() for answer in step.answers)
        raise BadAnswer(f"{_short(token)}, and none of {answers} is likely")
    floor = [min(likely.values())]
    return _logsumexp(bad or floor) - _logsumexp(good or floor), not (bad and good)


def _begins(token: str, answers: Sequence[str]) -> bool:
    """Tells whether one of some answers begins with a token, white space aside."""
    start = token.strip()
    return bool(start) and any(answer.strip().startswith(start) for answer in answers)


def _logsumexp(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).logsumexp(0))


def _written(text: str, texts: dict[str, str], spec: RemoteSpec) -> str:
    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text).render(texts)
    except TemplateError as error:
        raise UserError(
            f"scorer {spec.url}#{spec.model}@{spec.recipe}: its text cannot be written ({one_line(error)}); "
            "correct the file."
        ) from error


def _short(value: Any) -> str:
    """Shows what a judge has answered, in a few words."""
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(escaped(text)[:80]) if isinstance(value, str) else escaped(text)[:80]


def _end(text: str) -> str:
    return repr(escaped(text)[-60:])
