"""Prompts from files to token ids: read, check, apply the chat template once, key, choose and split."""

import csv
import hashlib
import io
import json
import unicodedata
from array import array
from importlib.resources import files
from pathlib import Path
from sys import byteorder
from typing import Literal

import torch

from engine.errors import UserError
from engine.records import Prompts

SUFFIXES = (".jsonl", ".csv", ".parquet")


def load_prompts(source: str | list[str], tokenizer, *, column: str = "prompt", system: str = "", max_prompt_tokens: int) -> Prompts:
    """Read prompts, apply the tokenizer's chat template once and tokenise.

    source: a jsonl, csv or parquet file, a name for `datasets.load_dataset` (split train), or a list of these.
    column: holds text, chat messages (a list of {"role", "content"}) or the JSON of such a list. The optional column "kind" is a label.
    system: put before messages that have no system message; a tokenizer without a chat template takes the text alone (and its own bos).

    Raises: UserError naming the file and the line (the row, counted from 1, where there are no lines).
    """
    text, kind, token_ids = [], [], []
    place_of: dict[int, str] = {}
    for name in [source] if isinstance(source, str | Path) else source:
        rows = read_rows(str(name))
        if not rows:
            raise UserError(f"{name}: no prompts in it; give at least one row with the column {column!r}.")
        for place, row in rows:
            if column not in row:
                raise UserError(f"{place}: no column {column!r}; columns found: {', '.join(map(str, row)) or 'none'}. See --prompt-column.")
            messages = _messages(row[column], column, place)
            ids = chat_ids(messages, tokenizer, system, place)
            if len(ids) > max_prompt_tokens:
                raise UserError(f"{place}: the prompt has {len(ids)} tokens, the limit is {max_prompt_tokens}; shorten or remove it.")
            key = prompt_key(ids)
            if key in place_of:
                raise UserError(f"{place}: the same prompt as {place_of[key]}; remove one, as equal prompts get equal random numbers.")
            place_of[key] = place
            text.append(messages[-1]["content"])
            kind.append(_kind(row.get("kind"), place))
            token_ids.append(ids)
    return Prompts(text=text, kind=kind, token_ids=token_ids, key_P=torch.tensor(list(place_of), dtype=torch.int64))


def prompt_key(token_ids: list[int]) -> int:
    """A hash of the token ids in [0, 2^63): BLAKE2b over little-endian int64, equal in every process and on every machine."""
    packed = array("q", token_ids)
    if byteorder == "big":
        packed.byteswap()
    return int.from_bytes(hashlib.blake2b(packed.tobytes(), digest_size=8).digest(), "little") >> 1


def subset(prompts: Prompts, n: int, seed: int, purpose: str) -> list[int]:
    """Indices of n prompts, chosen and ordered by a hash of (seed, purpose, key): the order of the file does not matter.

    Raises: UserError where n is more than the prompts there are.
    """
    if n > len(prompts):
        raise UserError(f"{n} prompts asked for {purpose}, but there are only {len(prompts)}; ask for fewer or give more prompts.")
    key_P = prompts.key_P.tolist()

    def rank(i: int) -> bytes:
        return hashlib.blake2b(f"{seed} {key_P[i]} {purpose}".encode(), digest_size=16).digest()

    return sorted(range(len(prompts)), key=rank)[:n]


def split(prompts: Prompts, seed: int, share: float = 0.2) -> tuple[list[int], list[int]]:
    """(train indices, held-out indices): a seeded share is held out, at least one prompt on either side.

    Raises: UserError where there are fewer than two prompts.
    """
    if len(prompts) < 2:
        raise UserError(f"{len(prompts)} prompt(s) cannot be split into training and held-out ones; give at least 2, or --heldout.")
    order = subset(prompts, len(prompts), seed, "split")
    n_heldout = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    return order[n_heldout:], order[:n_heldout]


def assert_disjoint(train: Prompts, heldout: Prompts, use: str = "training prompt") -> None:
    """Raises: UserError naming the first held-out prompt that is also one of `train`, each of them a `use`."""
    train_keys = set(train.key_P.tolist())
    for key, text in zip(heldout.key_P.tolist(), heldout.text, strict=True):
        if key in train_keys:
            raise UserError(f"the held-out prompt {text[:60]!r} is also a {use}; remove it from one of the two.")


def shipped_prompts(split: Literal["train", "heldout"]) -> list[str]:
    """Paths of the project's own prompts, for `load_prompts`."""
    folder = files("engine") / "assets" / "prompts"
    return [str(folder / f"{kind}_{split}.jsonl") for kind in ("everyday", "delicate")]


def lookalike_prompts() -> str:
    """Path of the project's harmless prompts that sound dangerous, for `load_prompts`: no run trains on them."""
    return str(files("engine") / "assets" / "prompts" / "lookalike.jsonl")


def overlap(prompts: Prompts, train: Prompts, tokenizer) -> list[int]:
    """Indices of the prompts that are training prompts too: whole conversations, compared without case, white space and ligatures."""

    def normal(token_ids: list[int]) -> str:
        return "".join(unicodedata.normalize("NFKC", tokenizer.decode(token_ids)).casefold().split())

    seen = {normal(ids) for ids in train.token_ids}
    return [i for i, ids in enumerate(prompts.token_ids) if normal(ids) in seen]


def read_rows(source: str) -> list[tuple[str, dict]]:
    """(place, row) of every row of a file or a dataset."""
    path = Path(source)
    return read_file(source) if path.suffix in SUFFIXES or path.is_file() else _read_dataset(source)


def read_file(source: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[tuple[str, dict]]:
    """(place, row) of every row of a file; the place is what error messages name. A csv's cells are texts.

    Raises: UserError for a file that is missing, of another kind or malformed.
    """
    path = Path(source)
    if path.suffix not in suffixes:
        raise UserError(f"{source}: not one of {', '.join(suffixes)}; convert it or rename it.")
    if not path.exists():
        raise UserError(f"{source}: no such file; check the path.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions.") from None
    if path.suffix == ".parquet":
        return _read_parquet(source, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8.") from None
    return _read_jsonl(source, text) if path.suffix == ".jsonl" else _read_csv(source, text)


def _read_jsonl(source: str, text: str) -> list[tuple[str, dict]]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise UserError(f"{source}:{number}: malformed JSON ({detail}); a jsonl file has one object per line.") from None
        if not isinstance(row, dict):
            raise UserError(f'{source}:{number}: a JSON {type(row).__name__}, not an object; write {{"prompt": ...}}.')
        if "\\u" in line:
            _check_encodes(json.dumps(row, ensure_ascii=False), f"{source}:{number}")
        rows.append((f"{source}:{number}", row))
    return rows


def _read_csv(source: str, text: str) -> list[tuple[str, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, header, first_line = [], None, 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise UserError(f"{source}:{first_line}: {len(fields)} fields, the header has {len(header)}; quote fields with commas.")
                rows.append((f"{source}:{first_line}", dict(zip(header, fields, strict=True))))
            # A quoted field may span lines: a row is named by its first one.
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}:{first_line}: malformed CSV ({error}); check the quotes.") from None
    return rows


def _read_parquet(source: str, data: bytes) -> list[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source}: parquet needs the package pyarrow: pip install pyarrow.") from None
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: not a readable parquet file ({_first_line(error)}).") from None
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, 1)]


def _read_dataset(source: str) -> list[tuple[str, dict]]:
    try:
        # Lazy: this import takes seconds.
        import datasets
    except ImportError:
        raise UserError(f"{source}: no such file; a dataset of that name needs the package datasets: pip install datasets.") from None
    try:
        rows = datasets.load_dataset(source, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{source}: neither a {', '.join(SUFFIXES)} file nor a dataset that loads ({_first_line(error)}).") from None
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, 1)]


def _messages(value: object, column: str, place: str) -> list[dict[str, str]]:
    """The cell as chat messages that end with a user turn."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parsed = None
        # Text may start with "[" and even be a JSON list; only a list of objects is meant as messages.
        if isinstance(parsed, list) and parsed and all(isinstance(message, dict) for message in parsed):
            value = parsed
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if value is None or value == []:
        raise UserError(f"{place}: empty prompt in column {column!r}; fill or remove the row.")
    if not isinstance(value, list):
        raise UserError(f"{place}: column {column!r} holds a {type(value).__name__}; give text or a list of messages.")
    for message in value:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UserError(f'{place}: message {str(message)[:60]!r} is not {{"role": text, "content": text}}.')
        _check_encodes(message["content"], place)
    if value[-1]["role"] != "user":
        raise UserError(f"{place}: the messages end with role {value[-1]['role']!r}; end them with a user turn.")
    if not value[-1]["content"].strip():
        raise UserError(f"{place}: empty prompt in column {column!r}; fill or remove the row.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_encodes(text: str, place: str) -> None:
    """JSON's escapes can write what no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text holds half a surrogate pair (\\ud800 to \\udfff alone); remove it.") from None


def chat_ids(messages: list[dict[str, str]], tokenizer, system: str, place: str) -> list[int]:
    """Token ids of the whole prompt, special tokens included once."""
    if not tokenizer.chat_template:
        if len(messages) > 1:
            raise UserError(f"{place}: {len(messages)} messages, but the tokenizer has no chat template; give plain text.")
        return tokenizer.encode(messages[0]["content"])

    from jinja2 import TemplateError

    if system and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise UserError(f"{place}: the chat template refuses these messages ({_first_line(error)}).") from None
    # The template writes the special tokens itself: adding them again would double the bos.
    return tokenizer.encode(text, add_special_tokens=False)


def check_known(token_ids: list[int], vocab_size: int, place: str) -> None:
    """Raises: UserError where a text has a special token that the model does not know."""
    if max(token_ids, default=0) >= vocab_size:
        raise UserError(f"{place}: it has token id {max(token_ids)}, the model knows {vocab_size} tokens; remove that special token.")


def _kind(value: object, place: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: column 'kind' holds a {type(value).__name__}; give text.")
    return value or ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
