"""The sampling that is asked of every engine: prompts, the number of responses to each, and their lengths."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import RunConfig
from engine.data.prompts import load_prompts, shipped_prompts
from engine.model.decoder import Decoder
from engine.model.packing import Group
from engine.records import Rollouts
from engine.rollout.sampler import generate
from engine.stages.inputs import stop_tokens
from kernels.random import combine

TEMPERATURE = 0.7
Responses = list[list[int]]  # tokens of each response, prompt-major, the stop token included


@dataclass(frozen=True)
class Work:
    """A request to sample."""

    prompts: list[list[int]]
    n: int  # responses to each prompt
    new: int  # most new tokens of a response; exactly these many without stop tokens
    stop: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Returns the number of all responses."""
        return len(self.prompts) * self.n

    @property
    def longest(self) -> int:
        """Returns the number of tokens of the longest prompt."""
        return max(map(len, self.prompts))

    def check(self, name: str, responses: Responses) -> None:
        """Compares the number and lengths of responses with the request.

        Raises: SystemExit where they differ.
        """
        least, lengths = 1 if self.stop else self.new, [len(response) for response in responses]
        if len(lengths) != self.rows or not all(least <= length <= self.new for length in lengths):
            tokens = f"{min(lengths)} to {max(lengths)} tokens"
            raise SystemExit(f"{name} made {len(lengths)} responses of {tokens}; nothing is timed")

    def sampled(
        self, model: Decoder, temperature: float = TEMPERATURE, max_rows: int | None = None
    ) -> Rollouts:
        """Samples with our engine, all responses side by side or `max_rows` of them."""
        return generate(
            model,
            self.prompts,
            n=self.n,
            max_new_tokens=self.new,
            temperature=temperature,
            stop_token_ids=self.stop,
            seed=int(combine(0)),
            max_rows=max_rows or self.rows,
        )

    def groups(self, rollouts: Rollouts) -> list[Group]:
        """Returns each prompt with its responses, without padding."""
        rows, responses = range(self.rows), responses_of(rollouts)
        return [
            Group(prompt, responses[p * self.n : (p + 1) * self.n], list(rows[p * self.n : (p + 1) * self.n]))
            for p, prompt in enumerate(self.prompts)
        ]

    def cut(self, rows: list[list[int]]) -> Responses:
        """Drops from each row what stands behind its stop token."""
        ends = (next((i + 1 for i, token in enumerate(row) if token in self.stop), len(row)) for row in rows)
        return [row[:end] for row, end in zip(rows, ends, strict=True)]


def responses_of(rollouts: Rollouts) -> Responses:
    """Drops the padding."""
    both = zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    return [row[:length] for row, length in both]


def random_work(vocabulary: int, rows: int, n: int, prompt: int, new: int) -> Work:
    """Asks for responses of a fixed length to prompts of `prompt` random tokens."""
    g = torch.Generator().manual_seed(0)
    return Work(torch.randint(vocabulary // 2, (rows // n, prompt), generator=g).tolist(), n, new)


def real_work(folder: Path, rows: int, n: int, new: int) -> Work:
    """Asks for responses that end where the model ends them, to prompts taken evenly
    from all of the quickstart's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = shipped_prompts("train")
    prompts = load_prompts(path, tokenizer, system=RunConfig.system, max_prompt_tokens=512)
    chosen = [i * len(prompts) // (rows // n) for i in range(rows // n)]
    return Work([prompts.token_ids[i] for i in chosen], n, new, stop_tokens(folder, tokenizer))
