"""The prompts that come with the project: how many, that no two ask the same, and which are judged first."""

import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine import keys
from engine.config import MocanConfig
from engine.data.dealing import subset
from engine.data.prompts import (
    assert_disjoint,
    first_look,
    load_prompts,
    lookalike_prompts,
    read_prompts,
    shipped_prompts,
)
from engine.data.reading import EVERY_ROW
from engine.quickstart import tiny_model_folder
from engine.records import Prompts
from engine.stages.job import heldout_prompts, judged_prompts
from tests.helpers.shipped import remembered

BENCH = Path(__file__).parents[2] / "bench"
# Of the 96 prompts that a verdict was on before there were more, in their order, for seeds 0 to 3.
FIRST_96 = ["ec7c73e6397a99fb", "26f89ddc7719cc69", "16e2952629e46d77", "657e51ecec514aa5"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def heldout(tokenizer) -> Prompts:
    return load_prompts(shipped_prompts("heldout"), tokenizer, max_prompt_tokens=4000)


def texts(path: str | Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


@pytest.mark.parametrize(("part", "each"), [("train", 210), ("heldout", 208)])
def test_half_of_the_shipped_prompts_are_delicate(tokenizer, part, each):
    paths = shipped_prompts(part)
    assert [Path(path).name for path in paths] == [f"everyday_{part}.jsonl", f"delicate_{part}.jsonl"]
    prompts = load_prompts(paths, tokenizer, max_prompt_tokens=4000)
    assert Counter(prompts.kind) == {"everyday": each, "delicate": each}


def test_shipped_prompts_are_disjoint(tokenizer, heldout):
    assert_disjoint(load_prompts(shipped_prompts("train"), tokenizer, max_prompt_tokens=4000), heldout)


def test_tests_read_the_shipped_prompts_once_for_equal_settings(tokenizer, tmp_path):
    """A user's files, and prompts behind another tokenizer, line or date, are read anew."""
    called = []
    read = remembered(lambda *given, **named: called.append(1) or read_prompts(*given, **named))
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "Who?"}))
    dated = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    dated.chat_template = "{{ strftime_now('%j') }}" + dated.chat_template
    longer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    longer.add_tokens(["everyday"])
    for source, by, system, reads in (
        (lookalike_prompts(), tokenizer, "", 1),
        (lookalike_prompts(), tokenizer, "Be kind.", 1),
        (lookalike_prompts(), longer, "", 1),
        (lookalike_prompts(), dated, "", 2),
        (str(own), tokenizer, "", 2),
    ):
        called.clear()
        options = {"system": system, "max_prompt_tokens": 4000}
        first, again = (read(source, by, EVERY_ROW, **options) for _ in range(2))
        plain, said = read_prompts(source, by, EVERY_ROW, **options)
        assert len(called) == reads and first[1] == again[1] == said
        assert first[0].token_ids == again[0].token_ids == plain.token_ids


def test_no_two_prompts_share_a_quarter_of_their_wording():
    paths = [*shipped_prompts("train"), *shipped_prompts("heldout"), lookalike_prompts()]
    asked = [text for path in [*paths, BENCH / "prompts" / "test.jsonl"] for text in texts(path)]
    assert len(asked) == 420 + 416 + 76 + 208
    words = [re.findall(r"\w+", text.casefold().replace("'", "")) for text in asked]
    wording = [set(zip(w, w[1:], w[2:], strict=False)) for w in words]
    for i, j in combinations(range(len(asked)), 2):
        both = len(wording[i] & wording[j])
        assert both <= len(wording[i] | wording[j]) / 4, (asked[i], asked[j])


def test_heads_were_trained_on_training_prompts_alone():
    train = {text for path in shipped_prompts("train") for text in texts(path)}
    heads = {text for kind in ("everyday", "delicate") for text in texts(BENCH / "heads" / f"{kind}.jsonl")}
    assert len(heads) == 2 * 132 and heads <= train


@pytest.mark.parametrize("seed", range(4))
def test_the_first_look_is_at_the_prompts_of_earlier_verdicts(heldout, seed):
    judged = judged_prompts(MocanConfig(seed=seed), heldout, 96)
    assert hashlib.sha256(json.dumps(judged.text).encode()).hexdigest()[:16] == FIRST_96[seed]
    assert Counter(judged.kind) == {"everyday": 48, "delicate": 48}
    # Without the others there is nothing to put them before.
    alone = heldout.select(sorted(first_look(heldout)))
    assert alone.text == [t for path in shipped_prompts("heldout") for t in texts(path)[:48]]
    assert judged.text == heldout_prompts(alone, 96, seed).text


def test_further_looks_take_the_others_in_a_seeded_order(heldout):
    first, more, every, other = (
        judged_prompts(MocanConfig(seed=seed), heldout, n).text
        for n, seed in ((96, 0), (192, 0), (1000, 0), (1000, 1))
    )
    assert more[:96] == first and every[:192] == more and len(more) == 192
    assert sorted(every) == sorted(other) == sorted(heldout.text)
    assert every[96:] != other[96:]
    # Binomial(96, 1/2) has standard deviation 5: four of them on either side.
    assert abs(sum(heldout.kind[heldout.text.index(text)] == "delicate" for text in more[96:]) - 48) < 20


@pytest.mark.parametrize(
    "own", [{"heldout": "own.jsonl"}, {"prompts": "own.jsonl"}, {"samples": "own.jsonl"}]
)
def test_prompts_of_the_user_have_no_first_look(heldout, own):
    assert MocanConfig().judged_on_shipped and not MocanConfig(**own).judged_on_shipped
    judged = judged_prompts(MocanConfig(**own), heldout, 96)
    assert judged.text == [heldout.text[i] for i in subset(heldout, 96, 0, keys.HELDOUT_PROMPTS)]
    assert judged.text != judged_prompts(MocanConfig(), heldout, 96).text
