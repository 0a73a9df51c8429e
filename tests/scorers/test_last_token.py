"""Classifiers on the project's decoder against transformers, one text at a time; and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from engine.config import CaidConfig
from engine.errors import UserError
from engine.records import Prompts
from engine.scorers import last_token
from engine.scorers.base import Scorers
from engine.scorers.find import content, find_scorer, load_scorers, sizes
from engine.scorers.models import model_scorer
from engine.scorers.scoring import try_out
from tests.helpers.published import (
    ANSWERS,
    FAMILIES,
    TALKS,
    edit_config,
    everything,
    vocabulary_size,
    write_byte_tokenizer,
    write_llama1_tokenizer,
    write_network,
)

CPU = torch.device("cpu")
TURNS = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"


def load(spec, folder):
    return find_scorer(str(spec), folder).load("x", CPU)


def classifier(folder, family="Llama", *, template=TURNS, tokenizer_pad="<pad>", **config):
    write_byte_tokenizer(folder, template, pad=tokenizer_pad)
    return write_network(
        folder, family, "ForSequenceClassification", **{"num_labels": 1, "pad_token_id": 0, **config}
    )


def alone(network, folder, talks, answers):
    """Returns the logits of each conversation by transformers, unpadded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for talk, answer in zip(talks, answers, strict=True):
        text = tokenizer.apply_chat_template(
            [*talk, {"role": "assistant", "content": answer}], tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(network(ids).logits[0].double())
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_scores_each_conversation_as_alone(tmp_path, tiny_folder, family):
    network = classifier(tmp_path, family)
    talks, answers = everything()
    right = alone(network, tmp_path, talks, answers)[:, 0]
    scorer = load(tmp_path, tiny_folder)
    assert (scorer(talks, answers) - right).abs().max() < 1e-5
    # Order and company do not matter.
    order = torch.randperm(len(talks), generator=torch.Generator().manual_seed(0)).tolist()
    moved = scorer([talks[i] for i in order], [answers[i] for i in order])
    assert (moved - right[order]).abs().max() < 1e-5 and right.std() > 0.1


def test_the_decoder_is_the_projects(tmp_path, tiny_folder, monkeypatch):
    classifier(tmp_path)
    monkeypatch.setattr(
        "engine.scorers.models.load_classifier", lambda *args: pytest.fail("through transformers")
    )
    load(tmp_path, tiny_folder)


EOS_LAST = TURNS.replace("<|end|>", "</s>")


@pytest.mark.parametrize(
    "changes",
    [
        {"template": EOS_LAST, "pad_token_id": 1},  # the last token is padding to transformers
        {"template": EOS_LAST, "pad_token_id": 1, "tokenizer_pad": "</s>"},
        {"template": EOS_LAST, "pad_token_id": None},
        {"pad_token_id": None},
        {"tokenizer_pad": None},
        {"tokenizer_pad": None, "pad_token_id": None},
        {"pad_token_id": 4},
    ],
)
def test_the_last_token_is_the_last_that_is_no_padding(tmp_path, tiny_folder, changes):
    network = classifier(tmp_path, **changes)
    talks, answers = everything()
    right = alone(network, tmp_path, talks, answers)[:, 0]
    assert (load(tmp_path, tiny_folder)(talks, answers) - right).abs().max() < 1e-5


@pytest.mark.parametrize(
    "labels, named, spec", [(1, {}, ""), (3, {"a": 0, "b": 1, "c": 2}, "#b"), (3, {}, "#1")]
)
def test_labels_are_the_rows_of_the_tensor(tmp_path, tiny_folder, labels, named, spec):
    network = classifier(tmp_path, num_labels=labels)
    id2label = {str(i): name for name, i in named.items()} or None
    edit_config(tmp_path, num_labels=None, id2label=id2label, label2id=None)
    right = alone(network, tmp_path, *everything())
    expected = right[:, 0] if labels == 1 else right[:, 1] - right[:, [0, 2]].logsumexp(1)
    assert (load(f"{tmp_path}{spec}", tiny_folder)(*everything()) - expected).abs().max() < 1e-5


def test_a_raw_logit_by_name_and_of_independent_labels(tmp_path, tiny_folder):
    network = classifier(tmp_path, num_labels=2)
    right = alone(network, tmp_path, *everything())
    odds, raw = load(tmp_path, tiny_folder), load(f"{tmp_path}#0:logit", tiny_folder)
    assert (odds(*everything()) - (right[:, 1] - right[:, 0])).abs().max() < 1e-5
    assert (raw(*everything()) - right[:, 0]).abs().max() < 1e-5
    edit_config(tmp_path, problem_type="multi_label_classification")
    multi = load(f"{tmp_path}#LABEL_1", tiny_folder)
    assert (multi(*everything()) - right[:, 1]).abs().max() < 1e-5
    with pytest.raises(UserError, match="has 2 labels .*; name one: .*#LABEL_0"):
        load(tmp_path, tiny_folder)


def test_tensors_that_nothing_reads_are_said(tmp_path, tiny_folder):
    network = classifier(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"mean": torch.ones(1), "std": torch.ones(1)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scorer = load(tmp_path, tiny_folder)
    assert (scorer(*everything()) - alone(network, tmp_path, *everything())[:, 0]).abs().max() < 1e-5
    prompts = Prompts(text=["Hi"], kind=[""], token_ids=[[7]], key_P=torch.arange(1))
    (said,) = try_out(Scorers(reward=scorer, costs=(), audits=()), [prompts], 8)
    assert said.endswith("2 tensor(s) of its weights, such as mean, are of no use to the model")


def test_code_is_not_asked_for_where_all_tensors_are_understood(tmp_path, tiny_folder):
    network = classifier(tmp_path)
    edit_config(tmp_path, auto_map={"AutoModelForSequenceClassification": "evil.Model"})
    right = alone(network, tmp_path, *everything())[:, 0]
    assert (load(tmp_path, tiny_folder)(*everything()) - right).abs().max() < 1e-5


def test_a_prompt_is_passed_once_for_all_its_responses(tmp_path, tiny_folder, monkeypatch):
    classifier(tmp_path, num_labels=3)
    passes, forward = [], last_token.Decoder.forward
    monkeypatch.setattr(
        last_token.Decoder,
        "forward",
        lambda self, tokens, *args, **options: (
            passes.append(len(tokens)) or forward(self, tokens, *args, **options)
        ),
    )
    names = [f"{name}={tmp_path}#LABEL_{i}" for i, name in enumerate("abc")]
    scorers = load_scorers(names[0], names[1:2], names[2:], folder=tmp_path, trunk="x", device=CPU).all
    long = [{"role": "user", "content": "x" * 500}]
    found = [scorer([long] * 8, [f"{i} cats" for i in range(8)]) for scorer in scorers]
    assert len(passes) == 1 and 500 < passes[0] < 700, "one pass for all labels, and one prompt"
    assert not torch.equal(found[0], found[1])


def test_groups_share_what_their_texts_begin_with():
    ids = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9], [5], [5, 6], [7, 7]]
    groups = last_token.shared(["a", "a", "a", "b", "b", "c"], ids)
    assert [g.prompt for g in groups] == [[1, 2], [], [7]]
    assert [[*g.prompt, *own] for g in groups for own in g.responses] == ids
    assert [row for g in groups for row in g.rows] == list(range(6))


def test_long_groups_are_cut_and_a_long_prompt_is_still_shared():
    ids = [[*range(3000), i, *range(600)] for i in range(9000, 9012)]
    groups = last_token.shared(["a"] * 12, ids)
    assert all(g.prompt == list(range(3000)) for g in groups)
    assert [len(g.rows) for g in groups] == [4, 4, 4]


def test_pairs_and_responses_alone(tmp_path, tiny_folder):
    network = classifier(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for form, texts in (("pair", lambda p, r: (p, r)), ("response", lambda p, r: (r,))):
        right = []
        for answer in ("A cat.", "No"):
            with torch.no_grad():
                right.append(
                    float(network(**tokenizer(*texts("Hi", answer), return_tensors="pt")).logits[0, 0])
                )
        found = load(f"{tmp_path}@{form}", tiny_folder)(["Hi", "Hi"], ["A cat.", "No"])
        assert found.tolist() == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize(
    "name, architecture, spec, text",
    [
        ("UltraRM-13b", "LlamaRewardModel", "", "Human: {}\nAssistant: {}"),
        ("mine", "LlamaRewardModel", "@ultrarm", "Human: {}\nAssistant: {}"),
        ("Eurus-RM-7b", "EurusRewardModel", "", "[INST] {} [/INST] {}"),
    ],
)
def test_a_regression_head(tmp_path, tiny_folder, name, architecture, spec, text):
    folder = tmp_path / name
    write_llama1_tokenizer(folder)
    network = write_network(
        folder, "Mistral" if "Eurus" in name else "Llama", "Model", vocab_size=vocabulary_size(folder)
    )
    tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
    tensors["regression_head.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, architectures=[architecture], auto_map={"AutoModel": "modeling.Model"})
    ids = AutoTokenizer.from_pretrained(folder)(text.format("Why?", "Because."), return_tensors="pt")
    with torch.no_grad():
        right = network(**ids).last_hidden_state[0, -1] @ tensors["regression_head.weight"][0]
    found = load(f"{folder}{spec}", tiny_folder)(["Why?"], ["Because."])
    assert found.tolist() == pytest.approx([float(right)], abs=1e-5)


def test_a_regression_head_without_a_text_lists_the_recipes(tmp_path, tiny_folder):
    write_llama1_tokenizer(tmp_path)
    network = write_network(tmp_path, "Llama", "Model", vocab_size=vocabulary_size(tmp_path))
    tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
    tensors["regression_head.weight"] = torch.ones(1, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="nothing says how its text is written; give .*@RECIPE, one of ultrarm"
    ):
        load(tmp_path, tiny_folder)


def test_the_prompts_start_is_cut_and_the_beginning_of_the_text_stays(tmp_path, tiny_folder):
    network = classifier(tmp_path, max_position_embeddings=128)
    scorer = load(tmp_path, tiny_folder)
    tokenizer, talk = AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "x" * 300 + "y"}]
    text = tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": "x cat."}], tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        right = float(network(torch.tensor([[ids[0], *ids[-127:]]])).logits[0, 0])
    assert scorer([talk], ["x cat."]).tolist() == pytest.approx([right], abs=1e-5)
    assert scorer.warnings() == [
        f"scorer {tmp_path} reads 128 tokens: the prompt's start was cut in 1 of 1 texts"
    ]


def test_a_recipe_that_does_not_fit_is_refused(tmp_path, tiny_folder):
    classifier(tmp_path)
    with pytest.raises(UserError, match="no recipe nothing; there are pair, hh, response, beaver, "):
        load(f"{tmp_path}@nothing", tiny_folder)
    with pytest.raises(UserError, match="the recipe llama-guard is for another kind of model"):
        load(f"{tmp_path}@llama-guard", tiny_folder)


def test_label_and_recipe_do_not_change_what_a_scorer_is_by_content(tmp_path, tiny_folder):
    classifier(tmp_path)
    named = content(f"{tmp_path}#LABEL_0@pair", [f"a={tmp_path}"], [], folder=tiny_folder)
    assert named["reward"] == named["a"] and named["a"]["source"] == str(tmp_path)


def test_the_command_that_converts_a_pickle_converts_it(tmp_path, tiny_folder, monkeypatch):
    network = classifier(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    with pytest.raises(UserError, match="a pickle, which is never executed") as refused:
        load(tmp_path, tiny_folder)
    (code,) = re.findall(r'python -c "(.*)"', str(refused.value))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    right = alone(network, tmp_path, *everything())[:, 0]
    assert (load(tmp_path, tiny_folder)(*everything()) - right).abs().max() < 1e-5


def test_bfloat16_states_are_read_by_a_float32_head(tmp_path, tiny_folder):
    classifier(tmp_path)
    context = last_token.LoadContext(trunk="x", device=CPU, loaded={}, dtype=torch.bfloat16)
    scorer = model_scorer(str(tmp_path), context)
    scores = scorer(*everything())
    assert scores.dtype == torch.float64
    steps = scores / 2.0 ** (scores.abs().log2().floor() - 7)
    assert (steps - steps.round()).abs().max() > 1e-3, "they are not rounded to bfloat16"
    # The folder's weights are float32: 28 GB of a 7B model, unless they are read in the run's dtype.
    error = (scores - load(tmp_path, tiny_folder)(*everything())).abs()
    assert 1e-4 < error.max() < 0.2


def test_a_model_is_counted_once_and_by_its_tensors(tmp_path, tiny_folder):
    network = classifier(tmp_path, num_labels=3)
    costs = tuple(f"{name}={tmp_path}#{i}" for i, name in enumerate("abc"))
    config = CaidConfig(reward=f"{tmp_path}#0", cost=costs, audit=("tests.helpers.scorers:letters",))
    (size,) = sizes(config, folder=tiny_folder, trunk="x", dtype=torch.bfloat16, device=CPU)
    weights = dict(network.named_parameters())
    assert size.weight_bytes == 2 * sum(weight.numel() for weight in weights.values())
    matrices = sum(weight.numel() for weight in weights.values() if weight.dim() == 2)
    assert size.products == matrices - weights["model.embed_tokens.weight"].numel() and size.shares_prompts


def test_weights_are_put_aside_between_uses(tmp_path, monkeypatch):
    classifier(tmp_path)
    places = []
    monkeypatch.setattr(
        last_token.Decoder, "to", lambda self, device: places.append(str(device)) or self, raising=True
    )
    for offload, expected in ((False, ["cpu"]), (True, ["cpu", "cpu"])):
        places.clear()
        context = last_token.LoadContext(trunk="x", device=CPU, loaded={}, offload=offload)
        model_scorer(str(tmp_path), context)([TALKS[0]], ANSWERS[:1])
        assert places == expected


def test_a_head_that_does_not_fit_is_refused(tmp_path, tiny_folder):
    classifier(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for bad, said in (
        (torch.ones(1, 8), "the head has shape"),
        (torch.full((1, 32), torch.nan), "not finite"),
    ):
        save_file({**weights, "score.weight": bad}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            load(tmp_path, tiny_folder)


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path, tiny_folder):
    classifier(tmp_path, vocab_size=200)
    with pytest.raises(UserError, match="the model knows 200 tokens"):
        load(tmp_path, tiny_folder)([TALKS[0]], ["yes"])
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 200
