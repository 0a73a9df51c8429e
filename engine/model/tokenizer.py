"""The tokenizer of a model folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError
from engine.files import is_file, one_line, shown
from engine.model.architecture import ModelConfig
from engine.model.checkpoint import read_config
from engine.model.folder import check_text_files, read_json


def load_tokenizer(folder: Path):
    """Loads the tokenizer of a model folder.

    Raises: UserError where it cannot be loaded, brings code, or has more tokens than the model, and
    where something else stands in the place of one of its files.
    """
    from transformers import AutoTokenizer

    refuse_code(folder)
    size = ModelConfig.from_json(read_config(folder), folder / "config.json").vocab_size
    check_text_files(folder)
    try:
        with library_warnings_off():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except MemoryError as error:
        raise UserError(
            f"{shown(folder)}: the memory does not hold the tokenizer; "
            "free some, or raise the limit (ulimit -v)."
        ) from error
    except BaseException as error:  # a panic in the library's compiled code is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UserError(
            f"{shown(folder)}: no tokenizer could be loaded ({shown(one_line(error))}); "
            "give a complete model folder."
        ) from error
    # Special tokens may lie beyond (Gemma 3 has one for images): no text gives them,
    # and prompts that name them are refused.
    plain = (number for number, token in tokenizer.added_tokens_decoder.items() if not token.special)
    if max(tokenizer.vocab_size, 1 + max(plain, default=-1)) > size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, vocab_size in config.json is {size}; "
            "give the model together with its own tokenizer."
        )
    # Who reads texts checks their lengths, and says in one line what to do; the library would warn before it.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


@contextmanager
def library_warnings_off() -> Iterator[None]:
    """Keeps what transformers warns of while it loads something off stderr: what of it matters is checked
    here, and said in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_code(
    folder: Path,
    names: tuple[str, ...] = ("config.json", "tokenizer_config.json"),
    cure: str = "use a checkpoint without it",
) -> None:
    """Raises a UserError where one of these files of a model folder names code of its own to be run."""
    for file in (folder / name for name in names):
        if is_file(file) and "auto_map" in read_json(file):
            raise UserError(
                f"{file}: auto_map names code that comes with the checkpoint, which is never run; {cure}."
            )
