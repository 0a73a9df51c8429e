"""Beaver reward and cost models of both eras, against the Llama of transformers on one text at a time."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from engine.ranks import ALONE
from engine.records import Prompts, Rollouts
from engine.scorers import scoring
from engine.scorers.base import Sampled, Scorers, TextScorer
from engine.scorers.find import find_scorer
from engine.scorers.scoring import try_out
from tests.helpers.published import ANSWERS, TALKS, everything, write_beaver

CPU = torch.device("cpu")
LATER = {"later": True, "do_normalize": True, "mean": 3.0, "var": 9.0}


def written(talk, answer):
    """Writes a conversation as safe-rlhf does, the end of the last answer included."""
    text = "BEGINNING OF CONVERSATION: "
    for message in [*talk, {"role": "assistant", "content": answer}]:
        user = message["role"] == "user"
        text += f"USER: {message['content']} ASSISTANT:" if user else f"{message['content']}</s>"
    return text


def ids_of(folder, text):
    """Tokenises by tokenizer.json alone, which puts <s> first."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def load(spec, folder):
    return find_scorer(spec, folder).load("x", CPU)


@pytest.fixture(scope="module")
def beaver(tmp_path_factory):
    """Returns the folder of a reward model of 2023, and its oracle."""
    folder = tmp_path_factory.mktemp("beaver") / "beaver-7b-v1.0-reward"
    return folder, write_beaver(folder)


def test_the_text_is_safe_rlhfs_in_the_ids_of_the_tokenizers_own_file(beaver):
    folder, _ = beaver
    ids = ids_of(folder, written([{"role": "user", "content": "hello"}], "Hello"))
    tokens = [Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(i) for i in ids]
    assert tokens[:6] == ["<s>", "▁BEGINNING", "▁OF", "▁CONVERSATION", ":", "▁USER"]
    # Alone the answer would begin with a space.
    assert tokens[-5:] == ["▁hello", "▁ASSISTANT", ":", "Hello", "</s>"]


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"score_type": "cost"},
        {"bias": 0.0},
        {"bias": 1.5},
        {**LATER, "bias": -0.5},
        {**LATER, "score_type": "cost", "bias": 0.25},
    ],
)
def test_a_beaver_model_scores_each_text_as_alone(tmp_path, tiny_folder, kind):
    oracle = write_beaver(tmp_path, **kind)
    talks, answers = everything()
    right = [
        oracle(ids_of(tmp_path, written(talk, answer))) for talk, answer in zip(talks, answers, strict=True)
    ]
    scorer = load(str(tmp_path), tiny_folder)
    assert scorer(talks, answers).tolist() == pytest.approx(right, abs=1e-5)
    assert len(set(right)) == len(right) and scorer.measures == kind.get("score_type", "reward")


def test_ids_that_the_policy_sampled_are_read_as_they_are(beaver, tiny_folder):
    folder, oracle = beaver
    prompt = ids_of(folder, "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:")
    answers = ["Hello", "Hello", "", "Hello"]
    asked = [[{"role": "user", "content": "hello"}]] * 4
    # H, e, l, l, o: other ids of the same text, as a policy may sample them.
    letters = [ids_of(folder, f"x{letter}")[-1] for letter in "Hello"]
    whole = ids_of(folder, "xHello")[-1:]
    given = [[*letters, 2], letters, [2], [*whole, 2]]
    prompts = [prompt, prompt, prompt, [*prompt, 7]]  # the last was asked otherwise: the text is written
    sampled = Sampled(prompt_ids=prompts, response_ids=given, finished=[True, False, True, True])
    scorer = load(str(folder), tiny_folder)
    right = [oracle([*prompt, *ids]) for ids in given]
    # Both sum in float32, in other orders: 1.6e-6 of a score of 6.6 was found.
    assert scorer(asked, answers, sampled).tolist() == pytest.approx(right, rel=3e-6, abs=1e-5)
    assert len(set(right)) == 4
    texts = oracle([*prompt, *whole, 2])
    assert scorer(asked, answers).tolist()[0] == pytest.approx(texts, rel=3e-6, abs=1e-5)


def test_a_stop_token_that_is_not_the_models_own_is_written_as_its_own(beaver, tiny_folder):
    folder, oracle = beaver
    prompt = ids_of(folder, "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:")
    letters = [ids_of(folder, f"x{letter}")[-1] for letter in "Hello"]
    pad = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<pad>")
    sampled = Sampled(prompt_ids=[prompt], response_ids=[[*letters, pad]], finished=[True])
    right = oracle([*prompt, *ids_of(folder, "xHello")[-1:], 2])
    found = load(str(folder), tiny_folder)([[{"role": "user", "content": "hello"}]], ["Hello"], sampled)
    assert found.tolist() == pytest.approx([right], abs=1e-5)


def test_scoring_hands_over_what_was_sampled():
    seen = []

    def function(prompts, responses, sampled=None):
        seen.append(sampled)
        return [float(i) for i in range(len(responses))]

    scorer = TextScorer(name="a", function=function, reads_messages=True, keywords=("sampled",))
    prompts = Prompts(text=["a", "b"], kind=["", ""], token_ids=[[7], [8, 9]], key_P=torch.arange(2))
    tokens, zeros = torch.tensor([[4, 2, 0], [5, 5, 5], [2, 0, 0], [6, 2, 0]]), torch.zeros(4, 3)
    rollouts = Rollouts(
        n=2,
        tokens=tokens,
        length=torch.tensor([2, 3, 1, 2]),
        finished=torch.tensor([True, False, True, True]),
        logprob=zeros,
        model_logprob=zeros,
        near_tie=zeros.bool(),
    )
    states = scoring.States([], None)
    forward = scoring.ReferenceForward(temperature=1.0, logprob=False, states=states)
    scorers = Scorers(reward=scorer, costs=(scorer,), audits=())
    scoring.score(SimpleNamespace(slices=ALONE), scorers, prompts, rollouts, ["A", "B", "", "C"], forward)
    assert seen[0] == Sampled(
        prompt_ids=[[7], [7], [8, 9], [8, 9]],
        response_ids=[[4, 2], [5, 5, 5], [2], [6, 2]],
        finished=[True, False, True, True],
    )


@pytest.mark.parametrize(
    "kind, spec, role, said",
    [
        ("cost", "{}", "reward", "is a cost model, where larger is worse, under --reward"),
        ("cost", "r=-{}", "reward", ""),
        ("reward", "{}", "cost", "is a reward model, where larger is better, under --cost"),
        ("reward", "-{}", "cost", ""),
        ("cost", "{}", "cost", ""),
        ("reward", "{}", "reward", ""),
    ],
)
def test_a_cost_model_as_a_reward_is_warned_about_and_its_negative_is_not(
    beaver, tmp_path, tiny_folder, kind, spec, role, said
):
    folder = beaver[0]
    if kind == "cost":
        folder = tmp_path / "cost"
        write_beaver(folder, score_type="cost")
    model = load(spec.format(folder), tiny_folder)
    other = TextScorer(name="other", function=lambda p, r: [float(len(text)) for text in r])
    scorers = Scorers(
        reward=model if role == "reward" else other, costs=(model if role == "cost" else other,), audits=()
    )
    prompts = Prompts(text=["Hi"], kind=[""], token_ids=[[7]], key_P=torch.arange(1))
    warned = try_out(scorers, [prompts], 8)
    assert len(warned) == bool(said) and all(said in line for line in warned)


def test_what_has_no_place_in_the_text_is_refused(beaver, tiny_folder):
    scorer = load(str(beaver[0]), tiny_folder)
    with pytest.raises(Exception, match="refuses the prompt .*it has no turns of system"):
        scorer([[{"role": "system", "content": "Sing."}, *TALKS[0]]], ANSWERS[:1])
