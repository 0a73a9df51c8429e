"""Sequence-classification models as scorers: whole conversations, padding, and texts that are too long."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from engine.errors import UserError
from engine.records import Prompts
from engine.scorers.base import Scorers
from engine.scorers.find import find_scorer
from engine.scorers.scoring import try_out

CPU = torch.device("cpu")


def reward_model(folder, **changes):
    """Writes a random reward model whose tokenizer is bytes with the template of `changes`, or none."""
    template, tokenizer_pad = changes.pop("template", None), changes.pop("tokenizer_pad", "<pad>")
    tokens = ["<pad>", "</s>", "<|turn|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:4]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token=tokenizer_pad)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = dict(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
        max_position_embeddings=256,
    )
    network = LlamaForSequenceClassification(LlamaConfig(**config)).eval()
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer


def alone(network, tokenizer, chat):
    ids = tokenizer.encode(
        tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        return float(network(ids).logits[0, 0])


TURNS = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
TALKS = [
    [{"role": "user", "content": "What is it?"}],
    [{"role": "user", "content": "Tell me a long story about the sea and the sky."}],
    [{"role": "system", "content": "Sing."}, {"role": "user", "content": "What is it?"}],
    [
        {"role": "user", "content": "I am Bo."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is it?"},
    ],
]
ANSWERS = ["A cat.", "No.", "It is what it is, and more of that for a while, until the end.", "Because."]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pad_token_id": 9},
        {"pad_token_id": -1},
        {"pad_token_id": None},
        {"pad_token_id": 3},  # the end of a turn, which every text ends with but for a line break
        {"tokenizer_pad": None},
        {"tokenizer_pad": None, "pad_token_id": None},
        {"template": TURNS[: TURNS.index("\n{% endfor")] + "</s>{% endfor %}", "pad_token_id": 1},
        {
            "template": TURNS[: TURNS.index("\n{% endfor")] + "</s>{% endfor %}",
            "pad_token_id": 1,
            "tokenizer_pad": "</s>",
        },
    ],
)
def test_a_reward_model_scores_each_conversation_as_alone(tmp_path, tiny_folder, changes):
    network, tokenizer = reward_model(tmp_path, **{"template": TURNS, **changes})
    right = [
        alone(network, tokenizer, [*talk, {"role": "assistant", "content": answer}])
        for talk, answer in zip(TALKS, ANSWERS, strict=True)
    ]
    scorer = find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
    assert scorer(TALKS, ANSWERS).tolist() == pytest.approx(right, abs=1e-5)
    assert scorer([talk[-1]["content"] for talk in TALKS[:2]], ANSWERS[:2]).tolist() == pytest.approx(
        right[:2], abs=1e-5
    )
    assert len(set(right)) == 4 and scorer.warnings() == []


def test_what_a_reward_model_reads_no_further_is_the_start_of_the_prompt(tmp_path, tiny_folder):
    network, tokenizer = reward_model(tmp_path, template=TURNS)
    scorer = find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
    assert scorer.max_tokens == 256
    long = [{"role": "user", "content": "x" * 400}]
    text = tokenizer.apply_chat_template([*long, {"role": "assistant", "content": "A cat."}], tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)[-256:]
    with torch.no_grad():
        right = float(network(torch.tensor([ids])).logits[0, 0])
    found = scorer([long, TALKS[0], long], ["A cat.", "A cat.", "A cat."]).tolist()
    short = alone(network, tokenizer, [*TALKS[0], {"role": "assistant", "content": "A cat."}])
    assert found == pytest.approx([right, short, right], abs=1e-5)
    (said,) = Scorers(reward=scorer, costs=(), audits=()).warnings()
    assert said.endswith("reads 256 tokens: the prompt's start was cut in 2 of 3 texts")
    assert scorer.warnings() == []
    with pytest.raises(UserError, match=r"reads 256 tokens, the response 'y+' has 3\d\d; lower --max-new"):
        scorer([TALKS[0]], ["y" * 300])


def test_a_pair_of_texts_keeps_its_response(tmp_path, tiny_folder):
    network, tokenizer = reward_model(tmp_path, template=None)
    scorer = find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
    whole = tokenizer("x" * 400, "A cat.")["input_ids"]
    with torch.no_grad():
        right = float(network(torch.tensor([whole[-256:]])).logits[0, 0])
    assert scorer(["x" * 400], ["A cat."]).tolist() == pytest.approx([right], abs=1e-5)
    assert len(scorer.warnings()) == 1
    with pytest.raises(UserError, match=r"the response 'y+' has 300;"):
        scorer(["Hi"], ["y" * 300])


def test_the_positions_of_a_reward_model_end_before_anything_is_sampled(tmp_path, tiny_folder):
    reward_model(tmp_path, template=TURNS)
    scorer = find_scorer(f"rm={tmp_path}", tiny_folder).load("x", CPU)
    prompts = Prompts(text=["Hi"], kind=[""], token_ids=[[7]], key_P=torch.arange(1))
    scorers = Scorers(reward=scorer, costs=(), audits=())
    assert try_out(scorers, [prompts], 200) == []
    with pytest.raises(UserError, match="scorer rm reads 256 tokens, .*; lower --max-new-tokens 256"):
        try_out(scorers, [prompts], 256)


def test_learned_positions_behind_the_padding_count(tmp_path, tiny_folder):
    reward_model(tmp_path)
    config = RobertaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        max_position_embeddings=50,
        pad_token_id=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    scorer = find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
    assert scorer.max_tokens == 48
    assert scorer(["x" * 90], ["A cat."]).isfinite().all()


def test_weights_that_do_not_fit_are_refused_in_one_line_by_name(tmp_path, tiny_folder, caplog):
    reward_model(tmp_path, template=TURNS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    scorer = find_scorer(str(tmp_path), tiny_folder)
    caplog.clear()
    with pytest.raises(
        UserError, match=r"embed_tokens.weight has shape \(260, 16\), config.* \(7, 16\); use"
    ):
        scorer.load("x", CPU)
    assert not caplog.records


def test_weights_that_a_reward_model_does_not_use_are_said_in_one_line(tmp_path, tiny_folder, capfd):
    reward_model(tmp_path, template=TURNS)
    weights = load_file(tmp_path / "model.safetensors") | {"value.weight": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    capfd.readouterr()
    scorer = find_scorer(str(tmp_path), tiny_folder).load("x", CPU)
    assert [line for line in capfd.readouterr().err.splitlines() if line and "it/s" not in line] == []
    assert scorer.notes == (
        f"scorer {tmp_path}: 1 tensor(s) of its weights, such as value.weight, are of no use to the model",
    )
