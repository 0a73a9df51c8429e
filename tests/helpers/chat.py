"""Prompts as token ids."""

from engine.data.chat import write_prompt


def chat_ids(*asked) -> list[int]:
    """Returns the ids of a whole prompt; takes what `write_prompt` does."""
    return write_prompt(*asked).token_ids
