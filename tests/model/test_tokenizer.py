"""engine.model.tokenizer: what the library would say beside our own lines."""

import json
import shutil

import pytest

from engine.model.tokenizer import load_tokenizer


def test_a_long_text_is_no_warning_of_the_library(tiny_folder, capfd):
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.model_max_length = 4
    assert len(tokenizer.encode("a text of more than four tokens")) > 4
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [-1, 10**9])
def test_a_config_that_is_refused_later_is_no_warning_of_the_library(tiny_folder, tmp_path, caplog, number):
    from transformers.utils import logging

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": number}))
    heard = logging.get_verbosity()
    load_tokenizer(folder)
    assert not caplog.records and logging.get_verbosity() == heard
