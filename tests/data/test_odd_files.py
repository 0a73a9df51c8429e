"""Malformed and odd data files: each is read as it is meant, or refused in one line that names the file."""

import csv
import json
import logging
import os
import re
import socket
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.data.prompts import TextLimits, load_prompts
from engine.data.response_pairs import read_response_pairs
from engine.data.tables import read_rows
from engine.errors import UserError
from engine.quickstart import tiny_model_folder
from engine.scorers.head_data import encode, read_head_rows, unique_texts

LONG = "7" * 5000
HUGE = "1" + "0" * 400
DEEP = "[" * 100_000
HI = '{"role": "user", "content": "Hi"}'
YES = '{"role": "assistant", "content": "Yes."}'
PRINTED = "[{'role': 'user', 'content': \"It's\"}]"
PARTS = '{"role": "user", "content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you"}]}'


def cell(text: str) -> str:
    """Writes a text as a cell of a csv file."""
    return '"' + text.replace('"', '""') + '"'


# Files of prompts that are read. Case -> (name, content, the texts of the prompts).
READ = {
    "number of 5000 digits beside": ("p.jsonl", f'{{"prompt": "a", "id": {LONG}}}', ["a"]),
    "minus 5000 digits beside": ("p.jsonl", f'{{"prompt": "a", "id": -{LONG}}}', ["a"]),
    "number of 5000 digits below": ("p.jsonl", f'{{"prompt": "a", "ids": [{{"x": [{LONG}]}}]}}', ["a"]),
    "1e400 beside": ("p.jsonl", '{"prompt": "a", "x": 1e400}', ["a"]),
    "NaN beside": ("p.jsonl", '{"prompt": "a", "x": NaN}', ["a"]),
    "deep enough beside": ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 50 + "]" * 50 + "}", ["a"]),
    "bracket and a long number": ("p.jsonl", f'{{"prompt": "[{LONG}] is large"}}', [f"[{LONG}] is large"]),
    "JSON list of a long number": ("p.jsonl", f'{{"prompt": "[{LONG}]"}}', [f"[{LONG}]"]),
    "a text of open brackets": ("p.jsonl", f'{{"prompt": "{"[" * 900} a"}}', ["[" * 900 + " a"]),
    "deep JSON text": ("p.jsonl", json.dumps({"prompt": "[" * 5000}), ["[" * 5000]),
    "list of numbers as text": ("p.jsonl", '{"prompt": "[1, 2]"}', ["[1, 2]"]),
    "list of texts as text": ("p.jsonl", '{"prompt": "[\\"a\\"]"}', ['["a"]']),
    "object as text": ("p.jsonl", '{"prompt": "{\\"a\\": 1}"}', ['{"a": 1}']),
    "object with a twin as text": (
        "p.jsonl",
        '{"prompt": "{\\"a\\": 1, \\"a\\": 2}"}',
        ['{"a": 1, "a": 2}'],
    ),
    "a set as text": ("p.jsonl", '{"prompt": "{x, y} is a set"}', ["{x, y} is a set"]),
    "a template as text": ("p.jsonl", '{"prompt": "{{ role }} plays"}', ["{{ role }} plays"]),
    "citation as text": ("p.jsonl", '{"prompt": "[12] says so"}', ["[12] says so"]),
    "checkbox as text": ("p.jsonl", '{"prompt": "[ ] buy milk"}', ["[ ] buy milk"]),
    "messages": ("p.jsonl", f'{{"prompt": [{HI}]}}', ["Hi"]),
    "messages as JSON": ("p.jsonl", json.dumps({"prompt": f"[{HI}]"}), ["Hi"]),
    "messages as JSON with spaces": ("p.jsonl", json.dumps({"prompt": f"\n [ {HI} ] "}), ["Hi"]),
    "messages as Python prints them": ("p.jsonl", json.dumps({"prompt": PRINTED}), ["It's"]),
    "printed with content first": (
        "p.jsonl",
        json.dumps({"prompt": "[{'content': 'Hi', 'role': 'user'}]"}),
        ["Hi"],
    ),
    "printed with None": (
        "p.jsonl",
        json.dumps({"prompt": "[{'role': 'user', 'content': 'Hi', 'name': None}]"}),
        ["Hi"],
    ),
    "printed with a bad escape": (
        "p.jsonl",
        json.dumps({"prompt": "[{'role': 'user', 'content': '\\d'}]"}),
        ["\\d"],
    ),
    "several turns": (
        "p.jsonl",
        f'{{"prompt": [{HI}, {YES}, {HI}]}}',
        ["user: Hi\n\nassistant: Yes.\n\nuser: Hi"],
    ),
    "one message": ("p.jsonl", f'{{"prompt": {HI}}}', ["Hi"]),
    "one message as JSON": ("p.jsonl", json.dumps({"prompt": HI}), ["Hi"]),
    "one printed message": ("p.jsonl", json.dumps({"prompt": "{'role': 'user', 'content': 'Hi'}"}), ["Hi"]),
    "messages in csv": ("p.csv", f"prompt\n{cell(f'[{HI}]')}\n", ["Hi"]),
    "printed messages in csv": ("p.csv", f"prompt\n{cell(PRINTED)}\n", ["It's"]),
    "printed message in csv": ("p.csv", "prompt\n" + cell("{'role': 'user', 'content': 'Hi'}"), ["Hi"]),
    "message with more keys": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": "Hi", "id": 1}]}',
        ["Hi"],
    ),
    "content in a part": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}',
        ["Hi"],
    ),
    "content in parts": (
        "p.jsonl",
        f'{{"prompt": [{PARTS.replace("user", "system")}, {PARTS}]}}',
        ["system: Hi, you\n\nuser: Hi, you"],
    ),
    "one message in parts as JSON": ("p.jsonl", json.dumps({"prompt": PARTS}), ["Hi, you"]),
    "parts as a table of structs gives them": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image": null}]}]}',
        ["Hi"],
    ),
    "byte order mark": ("p.jsonl", '\ufeff{"prompt": "a"}', ["a"]),
    "byte order mark in csv": ("p.csv", "\ufeffprompt\na\n", ["a"]),
    "carriage returns": ("p.jsonl", '{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ["a", "b"]),
    "carriage returns in csv": ("p.csv", "prompt\r\na\r\nb\r\n", ["a", "b"]),
    "old line ends in csv": ("p.csv", "prompt\ra\rb\r", ["a", "b"]),
    "line separator in a text": ("p.jsonl", '{"prompt": "a\u2028b"}', ["a\u2028b"]),
    "no last line end": ("p.csv", "prompt\na", ["a"]),
    "kind null": ("p.jsonl", '{"prompt": "a", "kind": null}', ["a"]),
    "empty kind": ("p.csv", "prompt,kind\na,\n", ["a"]),
    "unnamed columns": ("p.csv", "prompt,,\na,,\n", ["a"]),
    "cell of 200,000 letters": ("p.csv", f"prompt,note\na,{'x' * 200_000}\n", ["a"]),
    "quoted cell of 200,000 letters": ("p.csv", f'prompt,note\na,"{"x" * 200_000}"\n', ["a"]),
    "line break in a cell": ("p.csv", 'prompt\n"a\nb"\n', ["a\nb"]),
    "comma in a cell": ("p.csv", 'prompt\n"a, b"\n', ["a, b"]),
    "empty lines in csv": ("p.csv", "\n\nprompt\n\na\n\n", ["a"]),
    "text that is a number": ("p.csv", "prompt\n12\n", ["12"]),
    "text null": ("p.jsonl", '{"prompt": "null"}', ["null"]),
    "emoji as a pair": ("p.jsonl", '{"prompt": "\\ud83d\\ude00"}', ["\U0001f600"]),
    "NUL in a text": ("p.jsonl", '{"prompt": "a\\u0000b"}', ["a\0b"]),
    "control character escaped": ("p.jsonl", '{"prompt": "a\\u001bb"}', ["a\x1bb"]),
    "special token in a text": ("p.jsonl", '{"prompt": "<|im_end|>"}', ["<|im_end|>"]),
}

# Files of prompts that are refused. Case -> (name, content, what the line says behind the name).
REFUSED = {
    "JSON cut off": ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b', ":2: malformed JSON"),
    "cut behind the colon": ("p.jsonl", '{"prompt":', ":1: malformed JSON"),
    "single quotes": ("p.jsonl", "{'prompt': 'a'}", ":1: malformed JSON"),
    "trailing comma": ("p.jsonl", '{"prompt": "a",}', ":1: malformed JSON"),
    "two objects on a line": ("p.jsonl", '{"prompt": "a"} {"prompt": "b"}', ":1: malformed JSON"),
    "one array": ("p.jsonl", '[{"prompt": "a"}]', ":1: a JSON list, not an object"),
    "object over several lines": ("p.jsonl", '{\n"prompt": "a"\n}', ":1: malformed JSON"),
    "a bare text": ("p.jsonl", '"a"', ":1: a JSON str, not an object"),
    "a bare number": ("p.jsonl", "12", ":1: a JSON int, not an object"),
    "a bare long number": ("p.jsonl", LONG, ":1: a JSON float, not an object"),
    "null": ("p.jsonl", "null", ":1: a JSON NoneType, not an object"),
    "csv in jsonl": ("p.jsonl", "prompt\na\n", ":1: malformed JSON"),
    "raw control character": ("p.jsonl", '{"prompt": "a\tb"}', ":1: malformed JSON"),
    "100,000 lists": ("p.jsonl", DEEP, ":1: malformed JSON (nested too deep)"),
    "100,000 lists beside": (
        "p.jsonl",
        f'{{"prompt": "a", "x": {DEEP}',
        ":1: malformed JSON (nested too deep)",
    ),
    "100,000 objects": ("p.jsonl", '{"a":' * 100_000, ":1: malformed JSON (nested too deep)"),
    "key twice": ("p.jsonl", '{"prompt": "a", "prompt": "b"}', ":1: the key 'prompt' stands twice"),
    "key twice beside": ("p.jsonl", '{"prompt": "a", "n": 1, "n": 1}', ":1: the key 'n' stands twice"),
    "key twice in a message": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}]}',
        ":1: the key 'content' stands twice",
    ),
    "key twice in a message as JSON": (
        "p.jsonl",
        json.dumps({"prompt": '[{"role": "user", "content": "a", "content": "b"}]'}),
        ":1: column 'prompt': the key 'content' stands twice",
    ),
    "half a pair": ("p.jsonl", '{"prompt": "\\ud800"}', ":1: the text holds half a surrogate pair"),
    "other half": ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\udfff"}', ":2: the text holds half"),
    "pair the wrong way": ("p.jsonl", '{"prompt": "\\ude00\\ud83d"}', ":1: the text holds half"),
    "half a pair in a role": (
        "p.csv",
        "prompt\n" + cell('[{"role": "\\ud800", "content": "a"}, ' + HI + "]"),
        ":2: the text holds half",
    ),
    "half a pair as Python prints it": (
        "p.csv",
        "prompt\n" + cell("[{'role': 'user', 'content': '\\ud800'}]"),
        ":2: the text holds half",
    ),
    "messages cut off": (
        "p.jsonl",
        json.dumps({"prompt": f"[{HI}, {YES[:30]}"}),
        ":1: column 'prompt' begins as",
    ),
    "message cut off": (
        "p.jsonl",
        json.dumps({"prompt": HI[:-3]}),
        ":1: column 'prompt' begins as messages do",
    ),
    "printed messages cut off": (
        "p.jsonl",
        json.dumps({"prompt": PRINTED[:-4]}),
        ":1: column 'prompt' begins",
    ),
    "printed array of messages": (
        "p.csv",
        "prompt\n" + cell("[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"),
        ":2: column 'prompt' begins as messages do",
    ),
    "mixed quotes": (
        "p.jsonl",
        json.dumps({"prompt": '[{"role": \'user\', "content": null}]'}),
        ":1: column 'prompt' begins as messages do",
    ),
    "a program for messages": (
        "p.jsonl",
        json.dumps({"prompt": "[{'role': 'user', 'content': open('/etc/passwd').read()}]"}),
        ":1: column 'prompt' begins as messages do",
    ),
    "empty text": ("p.jsonl", '{"prompt": ""}', ":1: empty prompt"),
    "white space": ("p.jsonl", '{"prompt": " \\n\\t "}', ":1: empty prompt"),
    "empty cell": ("p.csv", 'prompt,kind\n"",x\n', ":2: empty prompt"),
    "null prompt": ("p.jsonl", '{"prompt": null}', ":1: empty prompt"),
    "empty list": ("p.jsonl", '{"prompt": []}', ":1: empty prompt"),
    "a number": ("p.jsonl", '{"prompt": 3}', ":1: column 'prompt' holds a int"),
    "a long number": ("p.jsonl", f'{{"prompt": {LONG}}}', ":1: column 'prompt' holds a float"),
    "a fraction": ("p.jsonl", '{"prompt": 0.5}', ":1: column 'prompt' holds a float"),
    "true": ("p.jsonl", '{"prompt": true}', ":1: column 'prompt' holds a bool"),
    "an object": ("p.jsonl", '{"prompt": {"text": "a"}}', ":1: column 'prompt' holds a dict"),
    "another form of message": (
        "p.jsonl",
        '{"prompt": [{"from": "human", "value": "a"}]}',
        ":1: message \"{'from': 'human', 'value': 'a'}\" is not",
    ),
    "texts for messages": ("p.jsonl", '{"prompt": ["a", "b"]}', ":1: message 'a' is not"),
    "message without content": ("p.jsonl", '{"prompt": [{"role": "user"}]}', ":1: message"),
    "content null": ("p.jsonl", '{"prompt": [{"role": "user", "content": null}]}', ":1: message"),
    "no parts": ("p.jsonl", '{"prompt": [{"role": "user", "content": []}]}', ":1: message"),
    "texts for parts": ("p.jsonl", '{"prompt": [{"role": "user", "content": ["a"]}]}', ":1: message"),
    "empty parts": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}',
        ":1: empty prompt",
    ),
    "an image": (
        "p.jsonl",
        PARTS.replace(', {"type"', ', {"type": "image", "image": "cat.png"}, {"type"').join(
            ('{"prompt": [', "]}")
        ),
        ":1: part \"{'type': 'image', 'image': 'cat.png'}\" of a message is not",
    ),
    "a part without text": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}',
        ":1: part \"{'type': 'text'}\" of a message",
    ),
    "half a pair in a part": (
        "p.csv",
        "prompt\n" + cell('[{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]'),
        ":2: the text holds half",
    ),
    "role a number": ("p.jsonl", '{"prompt": [{"role": 1, "content": "a"}]}', ":1: message"),
    "answer last": ("p.jsonl", f'{{"prompt": [{HI}, {YES}]}}', ":1: the messages end with role 'assistant'"),
    "one answer": ("p.jsonl", f'{{"prompt": {YES}}}', ":1: the messages end with role 'assistant'"),
    "one printed answer": (
        "p.jsonl",
        json.dumps({"prompt": "{'role': 'assistant', 'content': 'Hi'}"}),
        ":1: the messages end with role 'assistant'",
    ),
    "empty last turn": ("p.jsonl", '{"prompt": [{"role": "user", "content": " "}]}', ":1: empty prompt"),
    "kind a number": ("p.jsonl", '{"prompt": "a", "kind": 3}', ":1: column 'kind' holds a int"),
    "kind a list": ("p.jsonl", '{"prompt": "a", "kind": []}', ":1: column 'kind' holds a list"),
    "column twice": ("p.csv", "prompt,prompt\na,b\n", ": the column 'prompt' stands there twice"),
    "another column twice": ("p.csv", "prompt,x,x\na,1,2\n", ": the column 'x' stands there twice"),
    "too few fields": ("p.csv", "prompt,kind\na\n", ":2: 1 fields, the header has 2"),
    "too many fields": ("p.csv", "prompt\na,b\n", ":2: 2 fields, the header has 1"),
    "open quote": ("p.csv", 'prompt\n"a\n', ":2: malformed CSV"),
    "text behind a quote": ("p.csv", 'prompt\n"a"b\n', ":2: malformed CSV"),
    "other separator": ("p.csv", "prompt;kind\na;b\n", ":2: no column 'prompt'; columns found: prompt;kind"),
    "space in the header": ("p.csv", " prompt\na\n", ":2: no column 'prompt'"),
    "other case": ("p.jsonl", '{"Prompt": "a"}', ":1: no column 'prompt'; columns found: Prompt"),
    "no columns": ("p.jsonl", "{}", ":1: no column 'prompt'; columns found: none"),
    "empty csv": ("p.csv", "", ": no prompts in it"),
    "only line ends": ("p.jsonl", "\n\r\n\n", ": no prompts in it"),
    "latin 1": ("p.jsonl", b'{"prompt": "caf\xe9"}', ":1: byte 0xe9 is not UTF-8"),
    "latin 1 in csv": ("p.csv", b"prompt\na\ncaf\xe9\n", ":3: byte 0xe9 is not UTF-8"),
    "UTF-16": ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), ":1: byte 0xff is not UTF-8"),
    "surrogate as bytes": ("p.jsonl", b'{"prompt": "\xed\xa0\x80"}', ":1: byte 0xed is not UTF-8"),
    "gzip": ("p.jsonl", b"\x1f\x8b\x08\x00", ":1: byte 0x8b is not UTF-8"),
    "empty parquet": ("p.parquet", b"", ": not a readable parquet file"),
    "jsonl as parquet": ("p.parquet", b'{"prompt": "a"}\n', ": not a readable parquet file"),
    "magic alone": ("p.parquet", b"PAR1PAR1", ": not a readable parquet file"),
    "parquet as jsonl": ("p.jsonl", b"PAR1\x15\x04", ":1: malformed JSON"),
    "another suffix": ("p.txt", b"[]", ": not one of .jsonl, .json, .csv, .parquet, also with .gz or .xz"),
    "same prompt as messages": (
        "p.jsonl",
        f'{{"prompt": "Hi"}}\n{{"prompt": [{HI}]}}',
        ":2: the same prompt as",
    ),
    "same prompt as Python prints it": (
        "p.jsonl",
        '{"prompt": "Hi"}\n' + json.dumps({"prompt": "[{'role': 'user', 'content': 'Hi'}]"}),
        ":2: the same prompt as",
    ),
    "too long": ("p.jsonl", json.dumps({"prompt": "a" * 500}), ":1: the prompt has"),
}

# Rows of files for heads. Case -> (cells of the csv file, what is read: weight and finished).
HEAD_CELLS = {
    "False": ({"finished": "False"}, (1.0, False)),
    "FALSE": ({"finished": "FALSE"}, (1.0, False)),
    "false with spaces": ({"finished": " false "}, (1.0, False)),
    "0": ({"finished": "0"}, (1.0, False)),
    "True": ({"finished": "True"}, (1.0, True)),
    "1": ({"finished": "1"}, (1.0, True)),
    "empty": ({"finished": "", "weight": ""}, (1.0, True)),
    "weight": ({"weight": "2.5"}, (2.5, True)),
    "small weight": ({"weight": "1e-3"}, (0.001, True)),
}
HEAD_VALUES = {
    "null": ({"finished": None, "weight": None}, (1.0, True)),
    "false": ({"finished": False}, (1.0, False)),
    "0": ({"finished": 0}, (1.0, False)),
    "0.0": ({"finished": 0.0}, (1.0, False)),
    "text false": ({"finished": "false"}, (1.0, False)),
    "1": ({"finished": 1}, (1.0, True)),
    "weight": ({"weight": 3}, (3.0, True)),
}
HEAD_REFUSED = {
    "no flag": ('"finished": "maybe"', "\"finished\" is 'maybe'; it must be true or false"),
    "flag 2": ('"finished": 2', '"finished" is 2'),
    "flag a list": ('"finished": [false]', '"finished" is [False]'),
    "weight text": ('"weight": "heavy"', "\"weight\" is 'heavy'; it must be a number above 0"),
    "weight 0": ('"weight": 0', '"weight" is 0'),
    "weight below 0": ('"weight": -1', '"weight" is -1'),
    "weight true": ('"weight": true', '"weight" is True'),
    "weight of 400 digits": (f'"weight": {HUGE}', '"weight" is inf'),
    "weight of 5000 digits": (f'"weight": {LONG}', '"weight" is inf'),
    "weight NaN": ('"weight": NaN', '"weight" is nan'),
    "weight text inf": ('"weight": "inf"', "\"weight\" is 'inf'"),
    "weight a list": ('"weight": [1]', '"weight" is [1]'),
    "prompt 0": ('"prompt": 0', "column 'prompt' holds a int"),
    "prompt false": ('"prompt": false', "column 'prompt' holds a bool"),
    "prompt an object": ('"prompt": {}', "column 'prompt' holds a dict"),
    "label true": ('"label": true', '"label" is True'),
    "label 5000 digits": (f'"label": {LONG}', '"label" is inf'),
    "response null": ('"response": null', '"response" is empty; fill'),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path_factory.mktemp("model")))


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def all_rows(source: str) -> list[dict]:
    return [row for _, row in read_rows(source)]


def test_there_are_enough_cases():
    assert len(READ) + len(REFUSED) + len(HEAD_CELLS) + len(HEAD_VALUES) + len(HEAD_REFUSED) >= 150


@pytest.mark.parametrize("case", READ)
def test_odd_files_are_read(tmp_path, tokenizer, case, recwarn):
    name, content, texts = READ[case]
    limit = csv.field_size_limit()
    prompts = load_prompts(write(tmp_path / name, content), tokenizer, max_prompt_tokens=10**6)
    assert prompts.text == texts
    assert [messages[-1]["role"] for messages in prompts.messages] == ["user"] * len(texts)
    assert csv.field_size_limit() == limit
    assert not recwarn.list


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_files_are_refused(tmp_path, tokenizer, case):
    name, content, says = REFUSED[case]
    file = write(tmp_path / name, content)
    said = refusal(load_prompts, file, tokenizer, max_prompt_tokens=200)
    assert said.startswith(f"{file}{says}")
    # Behind what is wrong stands what to do.
    assert re.search(r"; [a-z ]+|See --prompt-column", said), said


@pytest.mark.parametrize("case", HEAD_CELLS)
def test_cells_of_csv_are_read_as_values(tmp_path, case):
    cells, found = HEAD_CELLS[case]
    header = ",".join(["prompt", "response", "label", *cells])
    file = write(tmp_path / "h.csv", f"{header}\nhi,yes,1,{','.join(cells.values())}\n")
    (row,), _ = read_head_rows([file], "auto")
    assert (row.weight, row.text.finished) == found


@pytest.mark.parametrize("case", HEAD_VALUES)
def test_values_of_json_are_read(tmp_path, case):
    values, found = HEAD_VALUES[case]
    row = {"prompt": "hi", "response": "yes", "label": 1, **values}
    (read,), _ = read_head_rows([write(tmp_path / "h.jsonl", json.dumps(row))], "auto")
    assert (read.weight, read.text.finished) == found


@pytest.mark.parametrize("case", HEAD_REFUSED)
def test_values_of_no_meaning_are_refused(tmp_path, case):
    field, says = HEAD_REFUSED[case]
    rest = {"prompt": "hi", "response": "yes", "label": 1}
    others = ", ".join(f'"{k}": {json.dumps(v)}' for k, v in rest.items() if f'"{k}"' not in field)
    file = write(tmp_path / "h.jsonl", f"{{{field}, {others}}}")
    said = refusal(read_head_rows, [file], "auto")
    assert said.startswith(f"{file}:1: ") and says in said


def test_an_empty_group_is_none(tmp_path):
    file = write(tmp_path / "h.csv", "prompt,response,label,group\na,yes,1,\nb,no,0,\nc,no,0,g\n")
    assert len({row.group for row in read_head_rows([file], "auto")[0]}) == 3


def test_cells_of_parquet_that_python_cannot_hold_matter_only_where_they_are_asked_for(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets = pyarrow.py_buffer(b"".join((2 * i).to_bytes(4, "little") for i in range(3)))
    raw = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"ok\xff\xfe")])
    table = pyarrow.table({
        "prompt": ["a", "b"],
        "when": pyarrow.array([2**60] * 2, pyarrow.timestamp("us")),
        "day": pyarrow.array([0, 2**30], pyarrow.date32()),
        "note": raw,
    })  # fmt: skip
    file = str(tmp_path / "p.parquet")
    parquet.write_table(table, file)
    assert load_prompts(file, tokenizer, max_prompt_tokens=200).text == ["a", "b"]
    (_, first), (_, second) = read_rows(file)
    assert (first["prompt"], first["note"]) == ("a", "ok") and first["day"].year == 1970
    said = refusal(load_prompts, file, tokenizer, column="note", max_prompt_tokens=200)
    assert said.startswith(f"{file} row 2: the cell of column 'note' cannot be read (")
    assert "column 'day' cannot be read" in refusal(second.get, "day")
    assert second.get("absent", 3) == 3 and second.get("prompt") == "b"


def test_damaged_parquet_is_refused_or_read_whole(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"question {i}" for i in range(50)]
    parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "p.parquet", write_page_checksum=True)
    whole = (tmp_path / "p.parquet").read_bytes()
    refused = 0
    damaged = [whole[:n] for n in range(0, len(whole), 97)]
    damaged += [whole[:n] + bytes([whole[n] ^ 64]) + whole[n + 1 :] for n in range(4, len(whole) - 8, 53)]
    for content in damaged:
        file = write(tmp_path / "d.parquet", content)
        try:
            found = load_prompts(file, tokenizer, max_prompt_tokens=10**4).text
        except UserError as error:
            assert str(error).startswith(file) and "\n" not in str(error)
            refused += 1
        else:
            assert found == texts
    assert refused > len(damaged) // 2


def test_a_parquet_column_twice_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"]
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    assert "the column 'prompt' stands there twice" in refusal(all_rows, str(tmp_path / "p.parquet"))


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop.jsonl", tmp_path / "loop.jsonl")
    os.symlink(tmp_path / "gone.jsonl", tmp_path / "dangling.jsonl")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "plain.jsonl").write_text("{}")
    for name, says in (
        ("pipe.jsonl", "a pipe or device"),
        ("loop.jsonl", "cannot be read (Too many levels of symbolic links)"),
        ("dangling.jsonl", "no such file"),
        ("folder.csv", "cannot be read (Is a directory)"),
        ("plain.jsonl/p.jsonl", "no such file"),
        ("n" * 300 + ".jsonl", "cannot be read (File name too long)"),
        ("a\0b.jsonl", "cannot be read (embedded null byte)"),
    ):
        assert says in refusal(all_rows, str(tmp_path / name)), name
    assert "not one of .jsonl" in refusal(all_rows, str(tmp_path / "pipe"))
    assert "not one of .jsonl" in refusal(all_rows, "/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("s.jsonl")
        assert "a pipe or device" in refusal(all_rows, "s.jsonl")


@pytest.mark.parametrize("error", [IndexError("list index"), RuntimeError("a script\nmore"), KeyError()])
def test_whatever_datasets_raises_is_one_line(monkeypatch, tmp_path, caplog, error):
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str):
            logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
            raise error

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    reason = str(error).partition("\n")[0] or "KeyError"
    said = refusal(all_rows, str(tmp_path))
    assert re.search(f"{tmp_path}: neither a .*; check the name, or save", said)
    assert f"({reason})" in refusal(all_rows, "someone/prompts:test")
    assert not caplog.records
    logging.getLogger("huggingface_hub.utils").warning("heard again")
    assert caplog.messages == ["heard again"]


def limits(max_new_tokens: int) -> TextLimits:
    return TextLimits(system="", max_positions=400, max_new_tokens=max_new_tokens, vocab_size=384)


def test_pairs_that_are_equal_after_the_cut_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "chosen": "same, then good", "rejected": "same, then bad"},
        {"prompt": "b", "chosen": "yes", "rejected": "no"},
        {"prompt": "c", "chosen": "yes", "rejected": "yes"},
        {"prompt": "d", "chosen": "no", "rejected": "yes, it is so"},
    ]
    file = write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    read = read_response_pairs(file, [], tokenizer, limits(8))
    assert read.prompts.text == ["b", "d"] and read.texts == ["yes", "no", "no", "yes, it "]
    assert read.rollouts.tokens.shape == (4, 8) and read.prompts.key_P.tolist() == [0, 1]
    assert read.notes() == [
        f"{file}: 3 of 8 answers are longer than --max-new-tokens 8 and were cut",
        f"{file}: 2 of 4 pairs have equal answers and were left out",
    ]
    read = read_response_pairs(file, [], tokenizer, limits(20))
    assert read.notes() == [f"{file}: 1 of 4 pairs have equal answers and were left out"]
    same = write(tmp_path / "s.jsonl", json.dumps(rows[0]) + "\n" + json.dumps(rows[2]))
    assert (
        "the two answers of every pair are equal (2 of 4 answers were cut at --max-new-tokens 8)"
        in refusal(read_response_pairs, same, [], tokenizer, limits(8))
    )


def test_cut_texts_of_heads_end_without_the_end_of_a_turn(tmp_path, tokenizer):
    file = write(
        tmp_path / "h.csv", "prompt,response,label,finished\na,yes,1,\na,no,0,False\na,a long answer,1,True\n"
    )
    texts = unique_texts(read_head_rows([file], "auto")[0])
    (group,) = encode(texts, tokenizer, limits(8))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [response[-1] == end for response in group.responses] == [True, False, False]
    assert [len(response) for response in group.responses] == [4, 2, 8]


def test_names_of_several_lines_stay_in_one(tmp_path, tokenizer):
    file = write(tmp_path / "a\nb.jsonl", '{"prompt": ""}\n')
    assert "a\\nb.jsonl:1: empty prompt" in refusal(load_prompts, file, tokenizer, max_prompt_tokens=9)
    file = write(tmp_path / "p.csv", 'a,"two\nlines"\nx,y\n')
    assert "columns found: a, two\\nlines." in refusal(load_prompts, file, tokenizer, max_prompt_tokens=9)
