"""Scores: heads against transformers' hidden states, text scorers, sequence classifiers,
the one place where a sign changes."""

import dataclasses
import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from engine import model, quickstart
from engine.config import CaidConfig, smoke
from engine.data.prompts import load_prompts
from engine.errors import UserError
from engine.model.packing import batches, groups
from engine.policy.forward import frozen_forward, logprob_gap
from engine.policy.lora import Adapter
from engine.ranks import Ranks
from engine.records import Prompts
from engine.rollout.sampler import generate
from engine.rollout.states import States
from engine.scorers import classifiers, heads, training
from engine.scorers.base import Head, Scorers, TextScorer
from engine.scorers.find import find_scorer, load_scorers
from engine.scorers.scoring import ReferenceForward, score, try_out
from engine.stages.inputs import read_inputs
from tests.helpers.chat import chat_ids
from tests.helpers.ranks import on_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tiny_folder, tmp_path_factory):
    """Returns model, tokenizer, prompts, rollouts and texts."""
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text('{"prompt": "Hi"}\n{"prompt": "What is a river?"}\n{"prompt": "Why?"}\n')
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    network = model.load(tiny_folder)
    prompts = load_prompts(str(file), tokenizer, max_prompt_tokens=200)
    rollouts = generate(
        network,
        prompts.token_ids,
        n=4,
        max_new_tokens=12,
        seed=0,
        stop_token_ids=(2, *range(60, 80)),
        temperature=0.8,
    )
    return network, tokenizer, prompts, rollouts, [f"text {i}" for i in range(12)]


def scores_of(world, scorers, *, texts=None, **forward):
    """Computes the scores of the world's responses, or of other texts in their place."""
    network, _, prompts, rollouts, decoded = world
    forward = ReferenceForward(**{"temperature": 0.8, "memory_budget_bytes": 2**20} | forward)
    return score(network, scorers, prompts, rollouts, texts or decoded, forward)


def fingerprint(tiny_folder):
    return model.fingerprint(tiny_folder)


def test_states_and_log_probs_equal_transformers(world, tiny_folder):
    network, _, prompts, rollouts, _ = world
    oracle = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    )
    pooled, logprob = frozen_forward(
        network, groups(prompts, rollouts), [1, 3], temperature=0.8, memory_budget_bytes=2**20
    )
    for r in range(12):
        prompt, response = prompts.token_ids[r // 4], rollouts.tokens[r, : rollouts.length[r]].tolist()
        with torch.no_grad():
            out = oracle(torch.tensor([prompt + response]), output_hidden_states=True)
        for layer in (1, 3):
            mean = out.hidden_states[layer][0, len(prompt) :].mean(0)
            assert (pooled[layer][r] - mean).abs().max() < 1e-4
        token = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1].double() / 0.8, -1)
        assert float(logprob[r]) == pytest.approx(
            float(token[range(len(response)), response].sum()), abs=1e-3
        )


def test_log_probs_under_an_adapter_are_those_of_the_merged_model(world, tmp_path):
    network, _, prompts, rollouts, _ = world
    adapter = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=1)
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.save(network, tmp_path / "merged", adapter=adapter)
    options = {"temperature": 0.8, "memory_budget_bytes": 2**20}
    pooled, logprob = frozen_forward(network, groups(prompts, rollouts), [1, 3], adapter=adapter, **options)
    expected = frozen_forward(model.load(tmp_path / "merged"), groups(prompts, rollouts), [1, 3], **options)
    assert (logprob - expected[1]).abs().max() < 1e-3
    assert all((pooled[layer] - expected[0][layer]).abs().max() < 1e-3 for layer in (1, 3))
    reference = frozen_forward(network, groups(prompts, rollouts), [3], **options)
    assert (logprob - reference[1]).abs().min() > 1e-2 and (pooled[3] - reference[0][3]).abs().max() > 1e-2


@pytest.mark.parametrize("adapted", [False, True])
def test_the_gap_of_sampled_to_trained_log_probs(world, adapted):
    network, _, prompts, _, _ = world
    adapter = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=1) if adapted else None
    with torch.no_grad():
        for up in adapter.up.values() if adapted else ():
            up.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    rollouts = generate(
        network, prompts.token_ids, n=4, max_new_tokens=6, temperature=0.8, seed=1, adapter=adapter
    )
    options = {"temperature": 0.8, "memory_budget_bytes": 2**20, "adapter": adapter}
    gap = logprob_gap(network, groups(prompts, rollouts), rollouts, **options)
    assert 0 < gap.mean <= gap.max < 1e-4 and 0 <= gap.kl < 1e-9
    # This sampler is off by a known amount at one token of each response.
    off = dataclasses.replace(rollouts, model_logprob=rollouts.model_logprob.clone())
    off.model_logprob[:, 0] += 0.1
    share = len(rollouts.length) / float(rollouts.length.sum())
    gap = logprob_gap(network, groups(prompts, off), off, **options)
    assert gap.max == pytest.approx(0.1, abs=1e-4) and gap.mean == pytest.approx(0.1 * share, rel=1e-2)
    assert gap.kl == pytest.approx((math.exp(-0.1) - 1 + 0.1) * share, rel=1e-2)


def test_cut_groups_give_the_same(world):
    network, _, prompts, rollouts, _ = world
    whole = groups(prompts, rollouts)
    cut = [g for batch in batches(whole, 100, longest=40) for g in batch]
    assert len(cut) > len(whole) and [r for g in cut for r in g.rows] == list(range(12))
    first, _ = frozen_forward(network, whole, [2], temperature=None, memory_budget_bytes=2**20)
    second, _ = frozen_forward(network, cut, [2], temperature=None, memory_budget_bytes=2**20)
    assert (first[2] - second[2]).abs().max() < 1e-5


def test_costs_are_negated_and_rewards_are_not(world):
    rising = TextScorer(name="rising", function=lambda p, r: [float(i) for i in range(len(r))])
    scorers = Scorers(reward=rising, costs=(rising, rising), audits=(rising,))
    scores = scores_of(world, scorers)
    expected = torch.arange(12, dtype=torch.float64).view(3, 4)
    assert torch.equal(scores.reward_PG, expected)
    assert torch.equal(scores.utility_PGJ, -expected[..., None].expand(-1, -1, 2))
    assert torch.equal(scores.audit_PGA, -expected[..., None])


def test_text_scorers_see_prompts_and_responses(world):
    _, _, prompts, _, texts = world
    seen = {}

    def judge(p, r):
        seen["prompts"], seen["responses"] = p, r
        return [0.0] * len(r)

    scorer = TextScorer(name="judge", function=judge)
    scorers = Scorers(reward=scorer, costs=(scorer,), audits=())
    scores_of(world, scorers, temperature=1.0)
    assert seen["prompts"] == [t for t in prompts.text for _ in range(4)] and seen["responses"] == texts


def test_ranks_that_hold_one_model_share_out_the_prompts_for_scorers_of_texts(world, tiny_folder):
    """Three prompts on two ranks; with one prompt, one rank asks nobody. A head needs all states on each."""
    whole, _, prompts, rollouts, texts = world
    head = find_scorer("helpfulness", tiny_folder).load(fingerprint(tiny_folder), CPU)

    def work(ranks: Ranks) -> list:
        network, found = model.load(tiny_folder, slices=ranks), []
        for some in ([0, 1, 2], [1]):
            asked = []

            def judge(p, r, sampled, asked=asked):
                asked += r
                return [
                    len(ids) + float(text.split()[1])
                    for ids, text in zip(sampled.response_ids, r, strict=True)
                ]

            scorers = Scorers(
                reward=head,
                costs=(TextScorer(name="judge", function=judge, keywords=("sampled",)),),
                audits=(),
            )
            own = [text for p in some for text in texts[4 * p : 4 * p + 4]]
            part = rollouts.of_prompts(range(some[0], some[-1] + 1))
            forward = ReferenceForward(temperature=0.8)
            scores = score(network, scorers, prompts.select(some), part, own, forward)
            found.append((asked, scores.utility_PGJ, scores.reward_PG, scores.ref_logprob_PG))
        return found

    alone = work(Ranks())
    first, second = on_ranks(2, work)
    for one, two, (asked, *expected) in zip(first, second, alone, strict=True):
        assert one[0] + two[0] == asked
        for scores in (one[1:], two[1:]):
            assert torch.equal(scores[0], expected[0])
            for found, value in zip(scores[1:], expected[1:], strict=True):
                assert torch.allclose(found, value, rtol=1e-5, atol=1e-5)


def test_head_file_round_trip_and_names(tiny_folder, tmp_path):
    head = Head(
        name="h",
        layer=2,
        weight_D=torch.randn(32, dtype=torch.float64),
        bias=0.5,
        trunk=fingerprint(tiny_folder),
    )
    head.save(tmp_path / "h")
    back = find_scorer(str(tmp_path / "h"), tiny_folder).load(head.trunk, CPU)
    assert torch.equal(back.weight_D, head.weight_D) and (back.name, back.layer, back.bias) == ("h", 2, 0.5)
    pooled = torch.randn(5, 32)
    assert torch.allclose(back(pooled), pooled.double() @ head.weight_D + 0.5)
    beside = find_scorer("harm", tiny_folder).load(head.trunk, CPU)
    assert isinstance(beside, Head) and beside.name == "harm"


def test_a_head_of_a_missing_trunk_or_a_broken_file_is_refused(tiny_folder, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "head.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a score head"):
        find_scorer(str(tmp_path / "broken"), tiny_folder)
    with pytest.raises(UserError, match="two scorers are named harm"):
        load_scorers(
            "helpfulness", ["harm"], ["harm"], folder=tiny_folder, trunk=fingerprint(tiny_folder), device=CPU
        )


@pytest.mark.parametrize(
    ("weight", "bias", "said"),
    [(float("nan"), 0.0, "not finite"), (1.0, float("inf"), "not finite"), (0.0, 1.0, "all 0")],
)
def test_a_head_that_says_nothing_is_refused(tmp_path, weight, bias, said):
    Head(
        name="h", layer=2, weight_D=torch.full((32,), weight, dtype=torch.float64), bias=bias, trunk="x"
    ).save(tmp_path / "h")
    with pytest.raises(UserError, match=f"head.safetensors: its weights are {said}.*make it again"):
        Head.load(tmp_path / "h")


def test_names_are_told_apart_before_anything_is_loaded(tiny_folder, monkeypatch):
    monkeypatch.setattr("engine.scorers.find.model_scorer", lambda *args: pytest.fail("loaded"))
    options = {"folder": tiny_folder, "trunk": "x", "device": CPU}
    with pytest.raises(UserError, match="two scorers are named a; give each its own name: NAME=SCORER"):
        load_scorers("org/reward", ["a=org/x", "a=-org/y"], [], **options)
    with pytest.raises(UserError, match="two scorers are named judge"):
        load_scorers("org/reward", ["org/judge"], ["module:judge"], **options)
    for costs, audits in ((["reward=org/x"], []), (["org/x"], ["module:reward"])):
        with pytest.raises(UserError, match="reward is what the reward is called"):
            load_scorers("org/reward", costs, audits, **options)


def test_a_name_and_a_sign_are_given_and_undone(tiny_folder):
    for spec, name, sign in (
        ("harm", "harm", 1),
        ("h=harm", "h", 1),
        ("h=-harm", "h", -1),
    ):
        scorer = find_scorer(spec, tiny_folder).load(fingerprint(tiny_folder), CPU)
        assert (scorer.name, scorer.sign) == (name, sign)


def test_scorers_of_texts_are_tried_on_the_runs_prompts():
    asked = []

    def tried(*texts):
        ids = [[7]] * len(texts)
        return Prompts(
            text=list(texts), kind=[""] * len(texts), token_ids=ids, key_P=torch.arange(len(texts))
        )

    def scorer(values, name="judge"):
        return TextScorer(name=name, function=lambda p, r: asked.append(p) or values[: len(r)])

    good, constant = scorer([1.0, 2.0, 3.0, 4.0]), scorer([2.5] * 4, "same")
    assert try_out(Scorers(reward=good, costs=(good,), audits=()), [tried("one", "two")], 8) == []
    assert asked == [["one", "two", "one", "two"]] * 2, "a scorer may know its prompts"
    (said,) = try_out(Scorers(reward=good, costs=(constant,), audits=()), [tried("one")], 8)
    assert "scorer same gave 2.5 for each of 4 trial answers" in said
    with pytest.raises(
        UserError, match=r"judge gave nan for response 0 to prompt 2 \('one'\); let it give a finite number"
    ):
        try_out(
            Scorers(reward=good, costs=(), audits=(scorer([0.0, 1.0, float("nan"), 2.0]),)), [tried("one")], 8
        )
    with pytest.raises(UserError, match="returned 3 scores for 4"):
        try_out(Scorers(reward=scorer([0.0] * 3), costs=(), audits=()), [tried("one")], 8)


def test_scorers_are_tried_on_a_conversation_of_every_form():
    def asked(*talks):
        texts, ids = ["x"] * len(talks), [[7]] * len(talks)
        messages = [[{"role": role, "content": text} for role, text in talk] for talk in talks]
        keys, rows = torch.arange(len(talks)), [json.dumps(talk) for talk in talks]
        return Prompts(text=texts, kind=texts, token_ids=ids, key_P=keys, messages=messages, rows=rows)

    def scores(prompts, responses, row):
        tried.extend(zip(prompts, responses, row, strict=True))
        if any("user" != talk[0]["role"] for talk in prompts):
            raise ValueError("it takes no system line")
        return [float(len(text)) for text in responses]

    tried = []
    judge = TextScorer(name="judge", function=scores, reads_messages=True, keywords=("row",))
    scorers = Scorers(reward=judge, costs=(), audits=())
    a, b, c = [("user", "a")], [("user", "b")], [("user", "c")]
    turns, more = ([("user", "c"), ("assistant", text), ("user", "d")] for text in "ef")
    assert try_out(scorers, [asked(a, b, a, b, c, turns), asked(more, c)], 8) == []
    talks = [[(message["role"], message["content"]) for message in talk] for talk, _, _ in tried]
    assert talks == [a, b, a, b, turns]
    assert [row for *_, row in tried] == [[list(turn) for turn in talk] for talk in talks]
    with pytest.raises(UserError, match="scorer judge raised ValueError: it takes no system line"):
        try_out(scorers, [asked(a), asked(b, [("system", "s"), *b])], 8)


@pytest.fixture
def classifier_folder(tiny_folder, tmp_path):
    """Writes the folder of a random sequence-classification model with one label."""
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


CODE = """
from pathlib import Path
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Model(LlamaForSequenceClassification): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""
MAPS = {
    "config.json": {"AutoModelForSequenceClassification": "evil.Model"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "evil.Tokenizer"]},
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("use", ["scorer", "policy", "head", "trunk"])
def test_code_of_a_checkpoint_is_never_run(tiny_folder, classifier_folder, tmp_path, monkeypatch, use, name):
    folder, marker = classifier_folder, tmp_path / "marker"
    if use != "scorer":
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    raw = json.loads((folder / name).read_text())
    if use == "scorer":  # a decoder of the project's with a head of rows would need no code
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["gate.weight"] = torch.ones(2)
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if name == "tokenizer_config.json":
        # Transformers does not have this class, which a tokenizer of its own would name.
        raw["tokenizer_class"] = "Tokenizer"
    (folder / name).write_text(json.dumps({**raw, "auto_map": MAPS[name]}))
    if use == "trunk":
        Head(
            name="h",
            layer=2,
            weight_D=torch.ones(32, dtype=torch.float64),
            bias=0.0,
            trunk=model.fingerprint(folder),
        ).save(tmp_path / "head")
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    monkeypatch.setattr(quickstart, "model_folder", lambda: folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{i}?", "chosen": f"a{i}", "rejected": f"b{i}"}) + "\n" for i in range(6)
        )
    )
    load = {
        "scorer": lambda: find_scorer(str(folder), tiny_folder).load("x", CPU),
        "policy": lambda: read_inputs(smoke(CaidConfig(model=str(folder), threads=1))),
        "head": lambda: training.train(
            training.HeadConfig(data=(str(rows),), out=str(tmp_path / "out"), model=str(folder), layer=2)
        ),
        "trunk": lambda: find_scorer(str(tmp_path / "head"), tiny_folder).load("x", CPU),
    }
    with pytest.raises(UserError, match=f"{name}: .*auto_map"):
        load[use]()
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_pickled_or_incomplete_scorer_is_refused(classifier_folder, tmp_path, tiny_folder):
    pickled, headless, adapted = (tmp_path / name for name in ("pickled", "headless", "adapted"))
    for folder in (pickled, headless, adapted):
        shutil.copytree(classifier_folder, folder)
    weights = safetensors.torch.load_file(classifier_folder / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model.bin, a pickle, which is never executed"):
        find_scorer(str(pickled), tiny_folder).load("x", CPU)
    weights.pop("score.weight")
    safetensors.torch.save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks tensor score.weight"):
        find_scorer(str(headless), tiny_folder).load("x", CPU)
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter and a model in one folder"):
        find_scorer(str(adapted), tiny_folder).load("x", CPU)


def counted(monkeypatch, owner, name):
    """Notes the arguments of all calls of owner.name, which goes on as before; returns the list."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(args) or real(*args, **options))
    return calls


def test_heads_on_another_trunk_share_it_and_its_forward_pass(world, tiny_folder, tmp_path, monkeypatch):
    _, tokenizer, prompts, _, texts = world
    monkeypatch.setattr("engine.quickstart.model_folder", lambda: tiny_folder)
    weights = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, layer, weight in zip("abc", (1, 3, 3), weights, strict=True):
        Head(name=name, layer=layer, weight_D=weight, bias=0.5, trunk=fingerprint(tiny_folder)).save(
            tmp_path / name
        )
    loads, passes = counted(monkeypatch, heads, "load"), counted(monkeypatch, heads, "frozen_forward")
    scorers = load_scorers(
        f"{tmp_path}/a",
        [f"{tmp_path}/b"],
        [f"{tmp_path}/c"],
        folder=tmp_path,
        trunk="the policy's",
        device=CPU,
    )
    assert scorers.layers == [], "of the policy's states none are read"
    texts = [text * (1 + i % 4) for i, text in enumerate(texts)]
    options = {"logprob": False, "states": States([], None)}
    scores = scores_of(world, scorers, texts=texts, **options)
    assert len(loads) == 1 and len(passes) == 1
    again = scores_of(world, scorers, texts=texts[::-1], **options)
    assert len(loads) == 1 and len(passes) == 2, "other texts are read anew"
    assert not torch.equal(again.reward_PG, scores.reward_PG)

    oracle = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    )
    columns = scores.reward_PG, -scores.utility_PGJ[..., 0], -scores.audit_PGA[..., 0]
    for i, text in enumerate(texts):
        prompt = chat_ids([{"role": "user", "content": prompts.text[i // 4]}], tokenizer, "", "p")
        response = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            states = oracle(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
        for column, layer, weight in zip(columns, (1, 3, 3), weights, strict=True):
            expected = states[layer][0, len(prompt) :].double().mean(0) @ weight + 0.5
            assert float(column.view(-1)[i]) == pytest.approx(float(expected), abs=1e-4)


def classifier(folder, tiny_folder, labels):
    torch.manual_seed(0)
    network = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=384,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=labels,
            pad_token_id=2,
            initializer_range=0.3,
        )
    ).eval()
    network.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(folder)
    return network, tokenizer


def test_labels_of_one_classifier_share_its_pass_in_batches_of_like_length(
    tiny_folder, tmp_path, monkeypatch
):
    shape = {"vocab_size": 384, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 3, "pad_token_id": 2}
    GPT2ForSequenceClassification(GPT2Config(**shape, initializer_range=0.3)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    monkeypatch.setattr(classifiers, "TOKENS_PER_FORWARD", 300)
    loads, shapes = counted(monkeypatch, GPT2ForSequenceClassification, "from_pretrained"), []
    forward = GPT2ForSequenceClassification.forward
    monkeypatch.setattr(
        GPT2ForSequenceClassification,
        "forward",
        lambda self, **inputs: shapes.append(inputs["input_ids"].shape) or forward(self, **inputs),
    )
    names = [f"{name}={tmp_path}#LABEL_{i}" for i, name in enumerate("abc")]
    scorers = load_scorers(names[0], names[1:2], names[2:], folder=tmp_path, trunk="x", device=CPU).all
    prompts, responses = [f"p{i}" for i in range(12)], ["word " * (1 + 7 * (7 * i % 12)) for i in range(12)]
    found = [scorer(prompts, responses) for scorer in scorers]
    assert len(loads) == 1
    rows = [shape[0] for shape in shapes]
    assert sum(rows) == 12 and len(rows) > 3, "one pass for all three labels"
    widths = [shape[1] for shape in shapes]
    assert (
        widths == sorted(widths) and all(n == 1 or n * width <= 300 for n, width in shapes) and max(rows) > 1
    )
    order = [7, 0, 11, 3, 9, 1, 10, 4, 8, 2, 6, 5]
    for scorer, scores in zip(scorers, found, strict=True):
        alone = torch.cat([scorer([p], [r]) for p, r in zip(prompts, responses, strict=True)])
        moved = scorer([prompts[i] for i in order], [responses[i] for i in order])
        assert (scores - alone).abs().max() < 1e-5 and (moved - scores[order]).abs().max() < 1e-5
        assert scores.std() > 1e-3


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_sequence_classification_models(tiny_folder, tmp_path, labels):
    network, tokenizer = classifier(tmp_path, tiny_folder, labels)
    spec = f"{tmp_path}#LABEL_1" if labels == 3 else str(tmp_path)
    if labels == 3:
        with pytest.raises(UserError, match="name one"):
            find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
        with pytest.raises(UserError, match="no label happy"):
            find_scorer(f"{tmp_path}#happy", tiny_folder).load("x", CPU)
    scorer = find_scorer(spec, tiny_folder).load("x", CPU)
    scores = scorer(["a", "b"], ["yes", "no, never"])
    for i, (p, r) in enumerate([("a", "yes"), ("b", "no, never")]):
        chat = [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        ids = tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            z = network(**ids).logits[0].double()
        chosen = {1: 0, 2: 1, 3: 1}[labels]
        expected = z[0] if labels == 1 else z[chosen] - torch.cat([z[:chosen], z[chosen + 1 :]]).logsumexp(0)
        assert float(scores[i]) == pytest.approx(float(expected), abs=1e-4)


TALKS = [
    [{"role": "user", "content": "What is it?"}],
    [{"role": "system", "content": "Sing."}, {"role": "user", "content": "What is it?"}],
    [
        {"role": "user", "content": "I am Bo."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is it?"},
    ],
]


def test_a_scorer_is_given_the_whole_conversation(world, tmp_path):
    _, tokenizer, _, rollouts, texts = world
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": talk}) + "\n" for talk in TALKS))
    prompts, seen = load_prompts(str(file), tokenizer, max_prompt_tokens=400), {}

    def scorer(name, **how):
        def function(prompts, responses):
            seen[name] = prompts
            return [float(i % 5) for i in range(len(responses))]

        return TextScorer(name=name, function=function, **how)

    scorers = Scorers(reward=scorer("text"), costs=(scorer("messages", reads_messages=True),), audits=())
    scores_of((world[0], tokenizer, prompts, rollouts, texts), scorers)
    assert seen["text"][::4] == [
        "What is it?",
        "system: Sing.\n\nuser: What is it?",
        "user: I am Bo.\n\nassistant: Hello.\n\nuser: What is it?",
    ]
    assert seen["messages"][::4] == TALKS and len(seen["messages"]) == 12
    try_out(scorers, [prompts], 8)
    assert seen["messages"] == [*TALKS, TALKS[0]] and seen["text"][0] == "What is it?"


def test_scores_that_are_not_finite_name_the_response(world):
    bad = TextScorer(name="bad", function=lambda p, r: [0.0] * 6 + [float("inf")] + [0.0] * 5)
    with pytest.raises(UserError, match="bad gave inf for response 2 to prompt 1"):
        scorers = Scorers(reward=bad, costs=(bad,), audits=())
        scores_of(world, scorers, temperature=1.0)


def test_empty_response_has_zero_states_and_log_prob_zero(world):
    network, _, prompts, rollouts, _ = world
    length = rollouts.length.clone()
    length[5] = 0
    empty = dataclasses.replace(rollouts, length=length)
    pooled, logprob = frozen_forward(
        network, groups(prompts, empty), [2], temperature=0.8, memory_budget_bytes=2**20
    )
    assert torch.all(pooled[2][5] == 0) and logprob[5] == 0 and pooled[2][6].abs().sum() > 0
