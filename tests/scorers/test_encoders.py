"""Classifiers of transformers: several labels, responses alone, and folders that leave things out."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from engine.errors import UserError
from engine.scorers.find import find_scorer
from tests.helpers.published import edit_config, write_byte_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["What is it?", "Hi", "Why do I ask?"]
RESPONSES = ["A cat, or two.", "No", "I cannot say it now."]
SHORT = dict(vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOXIC = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")


def write(folder, network, *, pad="<pad>", **config):
    """Saves a network with weights that show in its logits; returns it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    network.eval().save_pretrained(folder)
    write_byte_tokenizer(folder, None, pad=pad)
    edit_config(folder, **config)
    return network


def logits(network, folder, *texts):
    """Computes the logits of texts or pairs of texts, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [network(**tokenizer(*one, return_tensors="pt")).logits[0] for one in zip(*texts, strict=True)]
    return torch.stack(rows).double()


def scores(spec, folder):
    return find_scorer(spec, folder).load("x", CPU)(PROMPTS, RESPONSES)


def test_a_label_that_is_independent_of_the_others_is_read_by_its_raw_logit(tmp_path, tiny_folder):
    labels = dict(enumerate(TOXIC))
    network = BertForSequenceClassification(BertConfig(**SHORT, pad_token_id=0, id2label=labels))
    write(tmp_path, network, problem_type="multi_label_classification")
    alone = logits(network, tmp_path, RESPONSES)
    assert (scores(f"{tmp_path}#toxic@response", tiny_folder) - alone[:, 0]).abs().max() < 1e-5
    pairs = logits(network, tmp_path, PROMPTS, RESPONSES)
    assert (scores(f"{tmp_path}#threat", tiny_folder) - pairs[:, 3]).abs().max() < 1e-5
    with pytest.raises(UserError, match="name one: .*#toxic"):
        scores(str(tmp_path), tiny_folder)
    edit_config(tmp_path, problem_type=None)
    odds = pairs[:, 0] - pairs[:, 1:].logsumexp(1)
    assert (scores(f"{tmp_path}#toxic", tiny_folder) - odds).abs().max() < 1e-5
    assert (scores(f"{tmp_path}#toxic:logit", tiny_folder) - pairs[:, 0]).abs().max() < 1e-5


def test_a_response_is_judged_alone_where_its_model_was_trained_so(tmp_path, tiny_folder):
    config = DistilBertConfig(
        vocab_size=270, dim=32, hidden_dim=48, n_layers=2, n_heads=4, id2label={0: "NO_HUMOR", 1: "HUMOR"}
    )
    network = write(tmp_path, DistilBertForSequenceClassification(config))
    alone = logits(network, tmp_path, RESPONSES)
    assert (scores(f"{tmp_path}#1:logit@response", tiny_folder) - alone[:, 1]).abs().max() < 1e-5
    by_name = scores(f"humor=-{tmp_path}#HUMOR:logit@response", tiny_folder)
    assert (by_name - alone[:, 1]).abs().max() < 1e-5
    # The tokenizer puts nothing around texts, so of an empty response the end alone is read.
    empty = find_scorer(f"{tmp_path}#1:logit@response", tiny_folder).load("x", CPU)(["Hi", "Hi"], ["", "No"])
    right = logits(network, tmp_path, ["</s>", "No"])[:, 1]
    assert (empty - right).abs().max() < 1e-5
    odds = alone[:, 1] - alone[:, 0]
    assert (scores(f"{tmp_path}@response", tiny_folder) - odds).abs().max() < 1e-5
    pairs = logits(network, tmp_path, PROMPTS, RESPONSES)
    assert (scores(str(tmp_path), tiny_folder) - (pairs[:, 1] - pairs[:, 0])).abs().max() < 1e-5


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_folder_without_a_number_of_labels_or_a_padding_token(tmp_path, tiny_folder, pad):
    config = GPT2Config(vocab_size=270, n_embd=32, n_layer=2, n_head=4, num_labels=1)
    network = GPT2ForSequenceClassification(config)
    write(tmp_path, network, pad=pad, num_labels=None, id2label=None, label2id=None, pad_token_id=None)
    pairs = logits(network, tmp_path, PROMPTS, RESPONSES)
    assert pairs.shape[1] == 1
    assert (scores(str(tmp_path), tiny_folder) - pairs[:, 0]).abs().max() < 1e-5


def test_a_pair_of_question_and_answer(tmp_path, tiny_folder):
    network = DebertaV2ForSequenceClassification(
        DebertaV2Config(**SHORT, num_labels=1, pad_token_id=0, max_position_embeddings=128)
    )
    write(tmp_path, network)
    pairs = logits(network, tmp_path, PROMPTS, RESPONSES)
    assert (scores(str(tmp_path), tiny_folder) - pairs[:, 0]).abs().max() < 1e-5


def test_reward_models_of_hh_read_the_question_as_a_transcript(tmp_path, tiny_folder):
    network = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=270, n_embd=32, n_layer=2, n_head=4, num_labels=1)
    )
    write(tmp_path, network, pad_token_id=0)
    asked = [f"\n\nHuman: {prompt} \n\nAssistant:" for prompt in PROMPTS]
    pairs = logits(network, tmp_path, asked, RESPONSES)
    assert (scores(f"-{tmp_path}@hh", tiny_folder) - pairs[:, 0]).abs().max() < 1e-5
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh."}]
    scorer = find_scorer(f"{tmp_path}@hh", tiny_folder).load("x", CPU)
    transcript = "\n\nHuman: Hi\n\nAssistant: Oh.\n\nHuman: Why? \n\nAssistant:"
    right = logits(network, tmp_path, [transcript], ["No"])[0]
    found = scorer([[*turns, {"role": "user", "content": "Why?"}]], ["No"])
    assert (found - right).abs().max() < 1e-5


def test_a_long_pair_loses_the_prompts_start_and_a_long_response_alone_is_refused(tmp_path, tiny_folder):
    network = BertForSequenceClassification(
        BertConfig(**SHORT, num_labels=1, pad_token_id=0, max_position_embeddings=64)
    )
    write(tmp_path, network)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    scorer = find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
    inputs = tokenizer("x" * 90 + "y", "A cat.")
    last = {name: torch.tensor([values[-64:]]) for name, values in inputs.items()}
    with torch.no_grad():
        right = float(network(**last).logits[0, 0])
    assert scorer(["x" * 90 + "y"], ["A cat."]).tolist() == pytest.approx([right], abs=1e-5)
    alone = find_scorer(f"{tmp_path}@response", tiny_folder).load("x", CPU)
    with pytest.raises(UserError, match="the response 'y+' has 90; lower"):
        alone(["x"], ["y" * 90])


def test_weights_in_16_bits_are_read_in_the_runs_dtype(tmp_path, tiny_folder):
    network = BertForSequenceClassification(BertConfig(**SHORT, num_labels=1, pad_token_id=0))
    write(tmp_path, network)
    network.bfloat16().save_pretrained(tmp_path)
    pairs = logits(network.float(), tmp_path, PROMPTS, RESPONSES)
    assert (scores(str(tmp_path), tiny_folder) - pairs[:, 0]).abs().max() < 1e-5
