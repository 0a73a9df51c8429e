"""A byte tokenizer with control tokens, and a template that writes them."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def made(
    template: str | None = CHATML,
    *,
    eos: str | None = "</s>",
    adds_eos: bool = False,
    merges: Sequence[tuple[str, str]] = (),
):
    """Makes a byte tokenizer with the control tokens <s> </s> <|turn|> <|end|>.

    With merges it joins letters whatever stands between words, as sentencepiece does.
    """
    special = ["<s>", "</s>", "<|turn|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [first + second for first, second in merges]
    vocab = {token: i for i, token in enumerate([*special, *letters, *merged])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
