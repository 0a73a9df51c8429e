"""engine.model.tokenizer: what the library would say beside our own lines."""

from engine.model.tokenizer import load_tokenizer


def test_a_long_text_is_no_warning_of_the_library(tiny_folder, capfd):
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.model_max_length = 4
    assert len(tokenizer.encode("a text of more than four tokens")) > 4
    assert capfd.readouterr().err == ""
