"""engine.data: every reading error names file and line, the chat template is applied once,
keys and choices are stable."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine import keys
from engine.data.dealing import split, subset
from engine.data.prompts import assert_disjoint, load_prompts, overlap, prompt_key
from engine.errors import UserError
from engine.quickstart import tiny_model_folder
from engine.records import Prompts

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is rain?"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def bos_tokenizer():
    """Makes a byte tokenizer that puts <s> before every text; its chat template
    writes <s> too, as Llama's does."""
    vocab = {"<s>": 0} | {
        letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] "
        "%}{{ raise_exception('no ' + m.role) }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt "
        "%}[assistant]{% endif %}"
    )
    return tokenizer


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source, tokenizer, **options) -> Prompts:
    return load_prompts(source, tokenizer, **{"max_prompt_tokens": 200} | options)


def keyed(texts: list[str]) -> Prompts:
    ids = [list(text.encode()) for text in texts]
    return Prompts(
        text=texts, kind=[""] * len(texts), token_ids=ids, key_P=torch.tensor([prompt_key(i) for i in ids])
    )


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_template_is_applied_once(tmp_path, tokenizer, bos_tokenizer, system):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "What is snow?"}, {"prompt": CHAT}])
    for each in (tokenizer, bos_tokenizer):
        prompts = load(source, each, system=system)
        for ids, messages in zip(
            prompts.token_ids, [[{"role": "user", "content": "What is snow?"}], CHAT], strict=True
        ):
            line = [{"role": "system", "content": system}] if system else []
            expected = each.apply_chat_template(
                line + messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert ids == expected
        assert prompts.text == [
            "What is snow?",
            "user: Hi\n\nassistant: Hello.\n\nuser: What is rain?",
        ]
        assert (
            prompts.messages
            == prompts.conversations
            == [[{"role": "user", "content": "What is snow?"}], CHAT]
        )
        assert prompts.select([1]).messages == [CHAT]
    assert [ids.count(bos_tokenizer.bos_token_id) for ids in prompts.token_ids] == [1, 1]


def test_a_template_writes_the_date_that_it_is_given(tmp_path, bos_tokenizer):
    bos_tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}:{{ messages[-1].content }}"
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": "Ho"}])
    for now, expected in ((datetime(2024, 2, 29), "29 Feb 2024:"), (None, f"{datetime.now():%d %b %Y}:")):
        prompts = load(source, bos_tokenizer, now=now)
        assert [bos_tokenizer.decode(ids) for ids in prompts.token_ids] == [f"{expected}Hi", f"{expected}Ho"]


def test_system_line_of_the_data_stays(tmp_path, bos_tokenizer):
    messages = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "Hi"}]
    prompts = load(
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": messages}]), bos_tokenizer, system="Be brief."
    )
    assert bos_tokenizer.decode(prompts.token_ids[0]) == "<s>[system]Sing.[user]Hi[assistant]"


def test_prompts_that_a_template_writes_alike_are_said_to_be(tmp_path, bos_tokenizer):
    bos_tokenizer.chat_template = "{{ messages[-1].content | lower }}"
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Rain"}, {"prompt": "rain"}])
    with pytest.raises(UserError, match=r"p.jsonl:2: .*p.jsonl:1 as the chat template writes it; remove"):
        load(source, bos_tokenizer)


def test_without_chat_template_the_text_alone(tmp_path, bos_tokenizer):
    bos_tokenizer.chat_template = None
    prompts = load(
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Rain is"}]), bos_tokenizer, system="Be brief."
    )
    assert bos_tokenizer.decode(prompts.token_ids[0]) == "<s>Rain is"
    source = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": CHAT}])
    with pytest.raises(UserError, match=r"chat.jsonl:1: 3 messages.*no chat template"):
        load(source, bos_tokenizer)


def test_formats_agree(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    rows = [
        {"prompt": "Über, \u2028 two\nlines", "kind": "everyday"},
        {"prompt": '"Quoted"', "kind": ""},
        {"prompt": "[not] JSON", "kind": "delicate"},
    ]
    (tmp_path / "raw.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["kind", "prompt"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    loaded = [load(str(tmp_path / name), tokenizer) for name in ("raw.jsonl", "p.csv", "p.parquet")]
    for prompts in loaded:
        assert prompts.text == [row["prompt"] for row in rows]
        assert prompts.kind == [row["kind"] for row in rows]
        assert prompts.token_ids == loaded[0].token_ids
        assert torch.equal(prompts.key_P, loaded[0].key_P)
    assert loaded[0].key_P.dtype == torch.int64
    assert loaded[0].key_P.tolist() == [prompt_key(ids) for ids in loaded[0].token_ids]


def test_messages_as_json_text_and_in_parquet(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    expected = load(write_jsonl(tmp_path / "list.jsonl", [{"prompt": CHAT}]), tokenizer).token_ids
    assert (
        load(write_jsonl(tmp_path / "text.jsonl", [{"prompt": json.dumps(CHAT)}]), tokenizer).token_ids
        == expected
    )
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": CHAT}]), tmp_path / "p.parquet")
    assert load(str(tmp_path / "p.parquet"), tokenizer).token_ids == expected


def test_several_files_and_another_column(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"q": name}]) for name in ("one", "two")]
    assert load(paths, tokenizer, column="q").text == ["one", "two"]
    with pytest.raises(UserError, match=r"three.jsonl:1: the same prompt as .*one.jsonl:1"):
        load([*paths, write_jsonl(tmp_path / "three.jsonl", [{"q": "one"}])], tokenizer, column="q")


BAD_BYTES = {
    "malformed JSON": (
        "p.jsonl",
        b'{"prompt": "a"}\n\n{"prompt": "b"\n',
        r"p.jsonl:3: malformed JSON .*one object per line",
    ),
    "deep JSON": ("p.jsonl", b"[" * 200000, r"p.jsonl:1: malformed JSON \(nested too deep\)"),
    "not an object": ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', r"p.jsonl:2: a JSON list, not an object"),
    "bad utf-8": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"p.jsonl:2: byte 0xff is not UTF-8"),
    "bad utf-8 in csv": ("p.csv", b"prompt\na\nb\n\xe4\n", r"p.csv:4: byte 0xe4 is not UTF-8"),
    "empty file": ("p.jsonl", b"", r"p.jsonl: no prompts in it"),
    "blank lines": ("p.jsonl", b"\n \n", r"p.jsonl: no prompts in it"),
    "header only": ("p.csv", b"prompt\n", r"p.csv: no prompts in it"),
    "no column": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"text": "b", "n": 1}\n',
        r"p.jsonl:2: no column 'prompt'; columns found: text, n\.",
    ),
    "no column in csv": ("p.csv", b"q,kind\na,b\n", r"p.csv:2: no column 'prompt'; columns found: q, kind\."),
    "csv fields": ("p.csv", b'prompt,kind\n"two\nlines",x\na,b,c\n', r"p.csv:4: 3 fields, the header has 2"),
    "csv quotes": ("p.csv", b'prompt\na\n"open\n', r"p.csv:3: malformed CSV"),
    "empty prompt": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', r"p.jsonl:2: empty prompt"),
    "null prompt": ("p.jsonl", b'{"prompt": null}\n', r"p.jsonl:1: empty prompt"),
    "no messages": ("p.jsonl", b'{"prompt": []}\n', r"p.jsonl:1: empty prompt"),
    "number": ("p.jsonl", b'{"prompt": 3}\n', r"p.jsonl:1: column 'prompt' holds a int"),
    "bad message": ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', r"p.jsonl:1: message .* is not"),
    "half a surrogate": (
        "p.jsonl",
        b'{"prompt": "\\ud800"}\n',
        r"p.jsonl:1: the text holds half a surrogate",
    ),
    "half a surrogate elsewhere": (
        "p.jsonl",
        b'{"prompt": "\\u00e4", "response_0": "a\\uDC00"}\n',
        r"p.jsonl:1: the text holds half a surrogate",
    ),
    "half a surrogate in a message": (
        "p.csv",
        b'prompt\n"[{""role"": ""user"", ""content"": ""\\ud800""}]"\n',
        r"p.csv:2: the text holds half a surrogate",
    ),
    "assistant last": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", '
        b'"content": "b"}]}\n',
        r"p.jsonl:2: the messages end with role 'assistant'",
    ),
    "duplicate": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n',
        r"p.jsonl:3: the same prompt as .*p.jsonl:1;",
    ),
    "bad kind": ("p.jsonl", b'{"prompt": "a", "kind": 1}\n', r"p.jsonl:1: column 'kind' holds a int"),
    "not parquet": ("p.parquet", b"PAR0", r"p.parquet: not a readable parquet file"),
    "another suffix": (
        "p.txt",
        b"a\n",
        r"p.txt: not one of .jsonl, .json, .csv, .parquet, also with .gz or .xz",
    ),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_files_name_file_and_line(tmp_path, bos_tokenizer, case):
    name, content, message = BAD_BYTES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(str(tmp_path / name), bos_tokenizer)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_file(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"absent.jsonl: no such file"):
        load(str(tmp_path / "absent.jsonl"), tokenizer)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder.jsonl: cannot be read"):
        load(str(tmp_path / "folder.jsonl"), tokenizer)


def test_refusal_of_the_template_names_the_line(tmp_path, bos_tokenizer):
    messages = [{"role": "poet", "content": "Sing."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match=r"p.jsonl:1: the chat template refuses these messages \(no poet\)"):
        load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": messages}]), bos_tokenizer)


def test_long_prompt_says_length_and_limit(tmp_path, bos_tokenizer):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "ab"}, {"prompt": "abcdef"}])
    longest = len("<[user]abcdef[assistant]")  # <s> is one token, every other letter is one too
    assert len(load(source, bos_tokenizer, max_prompt_tokens=longest)) == 2
    with pytest.raises(
        UserError, match=rf"p.jsonl:2: the prompt has {longest} tokens, the limit is {longest - 1};"
    ):
        load(source, bos_tokenizer, max_prompt_tokens=longest - 1)


def test_dataset_names_go_to_datasets(monkeypatch, tokenizer):
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict]:
            if (name, split) != ("someone/prompts", "train"):
                raise FileNotFoundError(f"Dataset '{name}' not found\nlong story")
            return [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}][: 3 if Datasets.broken else 2]

        broken = False

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert load("someone/prompts", tokenizer).text == ["a", "b"]
    with pytest.raises(
        UserError,
        match=r"someone/else: neither .*nor a dataset that loads \(Dataset 'someone/else' not found\); check",
    ):
        load("someone/else", tokenizer)
    Datasets.broken = True
    with pytest.raises(UserError, match=r"someone/prompts row 3: empty prompt"):
        load("someone/prompts", tokenizer)


def test_key_is_stable_across_processes():
    ids = [1, 2**40, 0]
    program = "from engine.data.prompts import prompt_key; print(prompt_key([1, 2**40, 0]))"
    root = Path(__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert int(other) == prompt_key(ids)
    keys = {prompt_key([i, j]) for i in range(50) for j in range(50)}
    assert len(keys) == 2500
    assert all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 2**62
    assert prompt_key([1, 2]) != prompt_key([2, 1]) != prompt_key([2, 1, 0])


def test_subset_depends_on_seed_purpose_and_prompt_only():
    texts = [f"prompt {i}" for i in range(60)]
    prompts, backwards = keyed(texts), keyed(texts[::-1])
    chosen = [prompts.text[i] for i in subset(prompts, 20, 0, "slack")]
    assert chosen == [backwards.text[i] for i in subset(backwards, 20, 0, "slack")]
    assert chosen != [prompts.text[i] for i in subset(prompts, 20, 1, "slack")]
    assert chosen != [prompts.text[i] for i in subset(prompts, 20, 0, "train")]
    assert chosen != sorted(chosen)
    assert len(set(chosen)) == 20
    # A smaller choice is a prefix of a larger one.
    assert chosen[:5] == [prompts.text[i] for i in subset(prompts, 5, 0, "slack")]
    with pytest.raises(UserError, match=r"61 prompts asked for slack, but there are only 60"):
        subset(prompts, 61, 0, "slack")


def test_subset_is_uniform():
    prompts = keyed([f"prompt {i}" for i in range(10)])
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[subset(prompts, 5, seed, "x")] += 1
    # Binomial(1000, 1/2) has standard deviation 16: five of them on either side.
    assert (counts - 500).abs().max() < 80


def test_split_is_a_partition():
    prompts = keyed([f"prompt {i}" for i in range(50)])
    train, heldout = split(prompts, seed=3)
    assert len(heldout) == 10
    assert sorted(train + heldout) == list(range(50))
    assert split(prompts, seed=4) != (train, heldout)
    assert_disjoint(prompts.select(train), prompts.select(heldout))
    assert [len(part) for part in split(keyed(["a", "b"]), seed=0)] == [1, 1]
    with pytest.raises(UserError, match=r"1 prompt\(s\) cannot be split"):
        split(keyed(["a"]), seed=0)


def test_assert_disjoint_names_the_first_shared_prompt():
    with pytest.raises(UserError, match=r"the held-out prompt 'c' is also a training prompt"):
        assert_disjoint(keyed(["a", "b", "c"]), keyed(["x", "c", "a"]))


@pytest.mark.parametrize(
    ("trained", "held"), [("What is rain?", "WHAT  is\nrain? "), ("Is it \ufb01ne?", "is it fine?")]
)
def test_prompts_of_one_meaning_are_not_disjoint(trained, held):
    train, heldout = keyed(["a", trained]), keyed(["b", held])
    with pytest.raises(UserError) as refusal:
        assert_disjoint(train, heldout)
    assert f"the held-out prompt {held!r} is the training prompt {trained!r} but for case" in str(
        refusal.value
    )
    assert overlap(heldout, train) == [1]
    # What was said before the last turn counts too.
    earlier = [
        replace(
            keyed(["Why?"]),
            messages=[[{"role": "user", "content": said}, {"role": "user", "content": "Why?"}]],
        )
        for said in ("Yes.", "No.", "YES.")
    ]
    earlier = [replace(prompts, key_P=torch.tensor([i])) for i, prompts in enumerate(earlier)]
    assert_disjoint(earlier[0], earlier[1])
    assert overlap(earlier[2], earlier[0]) == [0] and overlap(earlier[1], earlier[0]) == []


def test_split_holds_prompts_of_one_meaning_out_together():
    texts = [f"prompt {i}" for i in range(50)]
    prompts, twins = keyed(texts), keyed([*texts, *(text.upper() for text in texts)])
    for seed in range(20):
        train, heldout = (twins.select(part) for part in split(twins, seed))
        assert_disjoint(train, heldout)
        assert len(heldout) == 20 and len(train) == 80
        # The split of prompts that all differ is that of their order by hash.
        order = subset(prompts, 50, seed, keys.SPLIT)
        assert split(prompts, seed) == (order[10:], order[:10])
    assert [len(part) for part in split(keyed(["a", "A", "a ", "b"]), 0)] in ([1, 3], [3, 1])
    with pytest.raises(
        UserError, match=r"1 prompt\(s\) that differ in more than case and spaces cannot be split"
    ):
        split(keyed(["a", "A"]), 0)
