"""Asks judges behind HTTP: a bounded number of requests at once, again after failures, and nothing twice.

A judge that is down for a minute costs a minute. One that stays down ends the command; what it has answered
is kept (`engine.scorers.answers`), so that the run goes on from there. A key for chat completions is taken
from OPENAI_API_KEY and stands in no file and no message.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from engine.errors import NotAnswered, UserError
from engine.files import escaped, one_line, parse_json
from engine.scorers.answers import Answers, key_of
from engine.scorers.base import Asked, LoadContext, Sampled, TextScorer
from engine.scorers.guest import CALLS_AT_ONCE
from engine.scorers.remote_forms import BadAnswer, ChatModel, RemoteSpec, RewardServer

KEY = "OPENAI_API_KEY"
CONNECT_S, ANSWER_S = 10.0, 600.0  # limits of one request
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0  # between two tries; each wait is twice the one before
PATIENCE_S = 600.0  # from the first failure of a request to giving up
PATIENCE_AT_FIRST_S = 20.0  # the same before anything was answered: the address may be wrong
AHEAD = 4 * CALLS_AT_ONCE  # requests that may be begun before the first of them is answered
HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(kw_only=True)
class Judge:
    """A judge behind HTTP."""

    spec: RemoteSpec
    form: RewardServer | ChatModel
    answers: Answers
    clock: Callable[[], float] = time.monotonic  # seconds
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    answered: bool = field(default=False)  # a request has been answered

    @staticmethod
    def of(spec: RemoteSpec, context: LoadContext) -> "Judge":
        """Finds the form of a judge. Raises: UserError where what it is asked cannot be read."""
        form = ChatModel.of(spec) if spec.model else RewardServer(context=context)
        return Judge(spec=spec, form=form, answers=context.answers)

    def __str__(self) -> str:
        model = f"#{self.spec.model}" if self.spec.model else ""
        return f"{self.spec.url}{model}"

    def scores(
        self, prompts: list[Asked], responses: list[str], sampled: Sampled | None = None
    ) -> list[float]:
        """Scores N responses: what is known already, and the rest by asking.

        Raises: NotAnswered for a judge that stays down, UserError for one that refuses or gives no score.
        What was answered before is kept.
        """
        items = self.form.items(prompts, responses, sampled)
        keys = [key_of(self.spec.url, self.spec.model, self.spec.recipe, item) for item in items]
        wanted = {k: item for k, item in zip(keys, items, strict=True) if self.answers.get(k) is None}
        if wanted:
            asyncio.run(self._ask(list(wanted.items())))
        return [self.answers.get(k) for k in keys]

    async def _ask(self, wanted: list[tuple[str, Any]]) -> None:
        """Asks for all items and keeps the answers in the order of the items, so that equal runs keep equal
        files."""
        free, begun = asyncio.Semaphore(CALLS_AT_ONCE), deque()
        n = self.form.at_once
        async with self._client() as client:
            try:
                for first in range(0, len(wanted), n):
                    if len(begun) == AHEAD:
                        await self._keep(begun)
                    part = wanted[first : first + n]
                    begun.append((part, asyncio.ensure_future(self._score(client, free, part))))
                while begun:
                    await self._keep(begun)
            finally:
                for _, task in begun:
                    task.cancel()
                await asyncio.gather(*(task for _, task in begun), return_exceptions=True)
                for part, task in begun:
                    if not task.cancelled() and task.exception() is None:
                        self._put(part, task.result())

    async def _keep(self, begun: deque) -> None:
        part, task = begun[0]
        scores = await task
        begun.popleft()
        self._put(part, scores)

    def _put(self, part: Sequence[tuple[str, Any]], scores: list[float]) -> None:
        for (key, _), score in zip(part, scores, strict=True):
            self.answers.put(key, score)

    async def _score(self, client, free: asyncio.Semaphore, part: Sequence[tuple[str, Any]]) -> list[float]:
        items = [item for _, item in part]
        async with free:
            answer = await self._answer(client, self.form.body(items))
        try:
            return self.form.read(answer, items)
        except BadAnswer as error:
            raise UserError(
                f"scorer {self}: it has answered {error}; what it has answered before is kept: mend the "
                "judge, or use another one."
            ) from error

    async def _answer(self, client: httpx2.AsyncClient, body: dict) -> Any:
        """Sends a request, and again while the judge is away; returns the JSON of its answer."""
        url, wait, since = self.form.url(self.spec), FIRST_WAIT_S, None
        while True:
            asked = 0.0
            try:
                async with asyncio.timeout(ANSWER_S):
                    response = await client.post(url, json=body)
                if not _is_passing(response.status_code):
                    return self._json(response)
                trouble, asked = self._said(response), retry_after(response.headers)
            except (httpx2.TransportError, TimeoutError) as error:
                trouble = _without_key(f"{type(error).__name__}: {one_line(error)}")
            now, pause = self.clock(), max(wait, asked)
            since = now if since is None else since
            patience = PATIENCE_S if self.answered else PATIENCE_AT_FIRST_S
            if now + pause - since > patience:
                raise NotAnswered(
                    f"scorer {self}: it does not answer ({trouble}), tried for {now - since:.0f} s"
                    + (f", and asks to wait {asked:.0f} s" if asked > wait else "")
                    + "; what it has answered is kept: see to that server"
                )
            await self.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _json(self, response: httpx2.Response) -> Any:
        """Reads an answer that is there to stay. Raises: UserError for one that is a refusal, or no JSON."""
        if response.status_code != 200:
            cure = "see to that server"
            if response.status_code in (401, 403):
                cure = f"set {KEY} to a key for it"
            elif response.is_redirect:
                cure = "give the address that it names"
            raise UserError(f"scorer {self}: it refuses ({self._said(response)}); {cure}.")
        try:
            found = parse_json(response.content)
        except ValueError as error:
            raise UserError(
                f"scorer {self}: it has answered no JSON ({one_line(error)}); is it the address of a judge?"
            ) from error
        self.answered = True
        return found

    def _said(self, response: httpx2.Response) -> str:
        """Says the status of a response and what stands in it, without the key."""
        text = response.text
        try:
            error = parse_json(text)
            error = error.get("error", error.get("detail", error)) if isinstance(error, dict) else error
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except ValueError:
            pass
        if response.is_redirect:
            text = f"to {response.headers.get('location', '')}"
        said = escaped(one_line(_without_key(text)))[:200] if text.strip() else ""
        return f"{response.status_code} {response.reason_phrase}{f': {said}' if said else ''}"

    def _client(self) -> httpx2.AsyncClient:
        key = _key() if self.spec.model else ""
        return httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=CALLS_AT_ONCE),
            # Reading the system's certificates takes longer than many an answer.
            verify=urlsplit(self.spec.url).scheme == "https",
        )

    def notes(self) -> tuple[str, ...]:
        """Says in lines what the user should know."""
        parts = urlsplit(self.spec.url)
        if self.spec.model and _key() and parts.scheme == "http" and parts.hostname not in HERE:
            return (f"scorer {self}: {KEY} goes to {parts.hostname} unencrypted; use https where it can",)
        return ()


def judge_scorer(spec: RemoteSpec, context: LoadContext) -> TextScorer:
    """Returns the scorer of a judge; nothing is asked yet. Raises: UserError as `Judge.of`."""
    judge = Judge.of(spec, context)
    recipe = judge.form.recipe if isinstance(judge.form, ChatModel) else None
    return TextScorer(
        name=spec.name,
        function=judge.scores,
        reads_messages=True,
        keywords=() if spec.model else ("sampled",),
        warnings=judge.form.warnings,
        measures=recipe.measures if recipe else "",
        notes=judge.notes(),
    )


def _key() -> str:
    """Returns the user's key; "" without one. Raises: UserError for what is no key."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} holds characters that no key has; set it again.")
    return key


def _without_key(text: str) -> str:
    return text.replace(key, "***") if (key := _key()) else text


def _is_passing(status: int) -> bool:
    """Tells whether a failure with this status may pass."""
    return status in (408, 429) or status >= 500


def retry_after(headers: httpx2.Headers) -> float:
    """Reads how many seconds a server asks to wait: as a number, or until a date by its own clock; else 0."""
    value = headers.get("retry-after", "")
    if value.strip().isdecimal():
        return float(value)
    try:
        until, now = (parsedate_to_datetime(text) for text in (value, headers.get("date", "")))
        return max(0.0, (until - now).total_seconds())
    except (TypeError, ValueError):
        return 0.0
