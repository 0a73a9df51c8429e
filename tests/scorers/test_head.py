"""Score heads: the fit, the split, the rows, the shipped files."""

import dataclasses
import json
import random
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize

from engine.data.chat import Written
from engine.errors import UserError
from engine.quickstart import tiny_model_folder
from engine.ranks import Ranks
from engine.scorers import training
from engine.scorers.base import Head
from engine.scorers.head_config import HeadConfig
from engine.scorers.head_data import Row, Text, hold_out, read_head_rows, response_ids
from engine.scorers.head_figures import auc, calibration_error
from engine.scorers.head_fit import fit_head, newton
from tests.helpers.ranks import on_ranks

HEADS = Path(str(files("engine"))) / "assets" / "heads"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(tiny_model_folder(tmp_path_factory.mktemp("tiny")))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def toy_answers(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Returns good answers, words of a's and b's, and bad ones, words of y's and z's."""
    rng = random.Random(seed)
    return [
        tuple(" ".join("".join(rng.choices(letters, k=4)) for _ in range(4)) for letters in ("abc", "xyz"))
        for _ in range(n)
    ]


def toy_pairs(n: int) -> list[dict]:
    return [
        {"prompt": f"Question {i}?", "chosen": good, "rejected": bad, "kind": "toy"}
        for i, (good, bad) in enumerate(toy_answers(n))
    ]


def toy_labels(n: int, prompt: bool = True) -> list[dict]:
    return [
        {"prompt": f"Question {i}?" if prompt else "", "response": text, "label": label}
        for i, answers in enumerate(toy_answers(n, seed=1))
        for label, text in zip((1, 0), answers, strict=True)
    ]


def test_learns_separable_pairs_and_labels_and_saves(tiny, tmp_path, capsys):
    config = HeadConfig(
        data=(
            write(tmp_path / "p.jsonl", toy_pairs(20)),
            write(tmp_path / "l.jsonl", toy_labels(20, prompt=False)),
        ),
        out=str(tmp_path / "toy"),
        model=tiny,
        layer=2,
        licence=("toy rows (public domain)",),
    )
    made = training.train(config)
    figures = json.loads((tmp_path / "toy" / "metrics.json").read_text())
    assert figures["test"]["p"]["pair_accuracy"] == 1.0
    assert figures["test"]["l"]["auc"] == 1.0
    assert "toy rows (public domain)" in (tmp_path / "toy" / "README.md").read_text()
    assert "pair accuracy" in capsys.readouterr().out
    loaded = Head.load(tmp_path / "toy")
    assert (loaded.name, loaded.layer, loaded.bias, loaded.trunk) == (made.name, 2, made.bias, made.trunk)
    assert made.name == "toy"
    assert torch.equal(loaded.weight_D, made.weight_D)


def test_equal_runs_write_equal_heads(tiny, tmp_path):
    data = (write(tmp_path / "p.jsonl", toy_pairs(8)),)
    for name in ("one", "two"):
        training.train(HeadConfig(data=data, out=str(tmp_path / name), name="toy", model=tiny, layer=1))
    assert (tmp_path / "one" / "head.safetensors").read_bytes() == (
        tmp_path / "two" / "head.safetensors"
    ).read_bytes()


def test_ranks_share_out_the_reading_and_write_one_head(tiny, tmp_path, capfd):
    """The states of a text may come from other batches, hence float32's rounding."""
    data = (write(tmp_path / "p.jsonl", toy_pairs(9)),)

    def trained(ranks: Ranks, out: str) -> torch.Tensor:
        config = HeadConfig(data=data, out=str(tmp_path / out), name="toy", model=tiny, layer=1)
        return training.train(config, ranks=ranks).weight_D

    one = trained(Ranks(), "one")
    capfd.readouterr()
    first, second = on_ranks(2, lambda ranks: trained(ranks, "two"))
    assert first.equal(second) and first.equal(Head.load(tmp_path / "two").weight_D)
    assert (first - one).abs().max() <= 1e-4 * one.abs().max()
    assert capfd.readouterr().out.count("written: ") == 1


def random_problem(seed: int = 0):
    """Returns a problem with rows of both kinds from two sources, over random states [24, 6]."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(24, 6, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0, 1.0]) + 3
    texts = [Text("chat", str(i), True) for i in range(24)]
    rows = [Row(texts[i], texts[i + 1], 1, "pairs", "", str(i), 1.0 + i % 3) for i in range(0, 12, 2)]
    rows += [Row(texts[i], None, i % 2, "labels", "", str(i), 1.0) for i in range(12, 24)]
    return rows, pooled, {text: i for i, text in enumerate(texts)}


def test_fit_is_the_minimum_that_scipy_finds():
    rows, pooled, at = random_problem()
    l2 = 0.05
    weight, bias = fit_head(rows, pooled, at, l2)
    x = pooled.double()
    std = x.std(0, correction=0)

    def objective(parameters):
        w, b = torch.as_tensor(parameters[:-1], dtype=torch.float64), parameters[-1]
        score, losses = x @ w + b, {"pairs": [0.0, 0.0], "labels": [0.0, 0.0]}
        for row in rows:
            margin = (
                score[at[row.text]] - score[at[row.other]]
                if row.other
                else score[at[row.text]] * (1 if row.label else -1)
            )
            losses[row.source][0] += row.weight * float(torch.nn.functional.softplus(-margin))
            losses[row.source][1] += row.weight
        return sum(a / b for a, b in losses.values()) + 0.5 * l2 * float((w * std).square().sum())

    found = minimize(
        objective, [0.0] * 7, method="Powell", options={"xtol": 1e-9, "ftol": 1e-14, "maxiter": 10_000}
    )
    ours = objective([*weight.tolist(), bias])
    assert ours <= found.fun + 1e-9
    assert ours >= found.fun - 1e-5


def test_pairs_alone_centre_the_score():
    rows, pooled, at = random_problem()
    pairs = [row for row in rows if row.other]
    weight, bias = fit_head(pairs, pooled, at, 0.1)
    used = [at[t] for row in pairs for t in row.texts]
    assert abs(float((pooled[used].double() @ weight + bias).mean())) < 1e-9


def test_newton_gradient_vanishes():
    generator = torch.Generator().manual_seed(3)
    signed, weight = (
        torch.randn(50, 5, generator=generator, dtype=torch.float64),
        torch.rand(50, generator=generator, dtype=torch.float64),
    )
    w = newton(signed, weight, 0.1).requires_grad_()
    ridge = torch.tensor([0.1] * 4 + [1e-7], dtype=torch.float64)
    (weight @ torch.nn.functional.softplus(-(signed @ w)) + 0.5 * (ridge * w * w).sum()).backward()
    assert w.grad.abs().max() < 1e-8


def test_scaling_a_state_does_not_change_the_scores():
    rows, pooled, at = random_problem()
    scale = torch.tensor([10.0, 1.0, 0.01, 1.0, 1.0, 3.0])
    first, second = fit_head(rows, pooled, at, 0.1), fit_head(rows, pooled * scale, at, 0.1)
    assert torch.allclose(
        pooled.double() @ first[0] + first[1], (pooled * scale).double() @ second[0] + second[1], atol=1e-4
    )


def test_split_holds_out_whole_prompts(tmp_path):
    config = HeadConfig(data=(write(tmp_path / "l.jsonl", toy_labels(30)),))
    rows, _ = read_head_rows(config.data, config.loss)
    train, heldout = hold_out(rows, 0)
    assert len({r.group for r in heldout}) == 6
    assert not {r.group for r in train} & {r.group for r in heldout}
    assert len(train) + len(heldout) == len(rows)
    assert hold_out(rows, 1)[1] != heldout
    assert hold_out(rows[::-1], 0)[1] == heldout[::-1]


def test_shared_texts_leave_the_training_rows(tiny, tmp_path, capsys):
    pairs = toy_pairs(10)
    copy = dict(pairs[0], prompt="Another one?", chosen="  " + pairs[0]["chosen"].upper() + "\n")
    config = HeadConfig(
        data=(write(tmp_path / "a.jsonl", pairs[1:] + [copy]),),
        test=(write(tmp_path / "b.jsonl", pairs[:1]),),
        out=str(tmp_path / "o"),
        model=tiny,
        layer=1,
    )
    training.train(config)
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["removed_shared_rows"] == 1
    assert "1 training rows removed" in capsys.readouterr().out


def test_a_head_without_rows_to_judge_it_on_is_refused(tiny, tmp_path, capsys):
    long = [row | {"prompt": "x" * 5000, "response": f"{row['response']} z"} for row in toy_labels(3)]
    config = HeadConfig(
        data=(write(tmp_path / "a.jsonl", toy_labels(10)),),
        test=(write(tmp_path / "b.jsonl", long),),
        out=str(tmp_path / "o"),
        model=tiny,
        layer=1,
    )
    with pytest.raises(UserError, match="no held-out rows are left to judge the head on"):
        training.train(config)
    assert "6 rows removed: with a prompt of more than 2000 tokens" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


GOOD = {"prompt": "p", "response": "r", "label": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "response": "r"}, 'no "label"'),
        ({"response": "r", "label": 1}, 'no "prompt"'),
        ({"question": "q", "Response": "r"}, "columns found are question, Response: name others by --prompt"),
        ({"prompt": "p", "chosen": "r"}, 'no "rejected"'),
        ({"prompt": "p", "chosen": "r", "rejected": "r "}, "same text"),
        ({"prompt": "p", "response": " ", "label": 1}, '"response" is empty'),
        ({"prompt": 5, "response": "r", "label": 1}, "int"),
        ({**GOOD, "label": 2}, '"label" is 2'),
        ({**GOOD, "weight": 0}, '"weight" is 0'),
        ([1], "not an object"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, says):
    file = write(tmp_path / "bad.jsonl", [GOOD, row])
    config = HeadConfig(data=(file,), out=str(tmp_path / "o"), strict=True)
    with pytest.raises(UserError) as error:
        training.train(config)
    assert "bad.jsonl:2" in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": ()}, "--data"),
        ({"out": ""}, "--out"),
        ({"loss": "hinge"}, "--loss hinge"),
        ({"l2": 0.0}, "--l2 0.0"),
        ({"layer": 99}, "--layer 99"),
        ({"loss": "pairs"}, "--loss is pairs"),
    ],
)
def test_bad_settings_are_named(tiny, tmp_path, change, says):
    config = HeadConfig(
        data=(write(tmp_path / "l.jsonl", toy_labels(5)),), out=str(tmp_path / "o"), model=tiny, layer=1
    )
    with pytest.raises(UserError, match=says):
        training.train(dataclasses.replace(config, **change))
    assert not (tmp_path / "o").exists()


def test_pairs_that_the_cut_makes_equal_are_removed(tiny, tmp_path, capsys):
    pairs = [
        {**row, "chosen": row["chosen"] + "!", "rejected": row["rejected"] + "?"} for row in toy_pairs(8)
    ]
    alike = [{"prompt": f"p{i}", "chosen": f"aaaaaaaa{i}", "rejected": f"aaaaaaaa {i}"} for i in range(3)]
    config = HeadConfig(
        data=(write(tmp_path / "a.jsonl", pairs + alike),), out=str(tmp_path / "o"), model=tiny, layer=1
    )
    training.train(dataclasses.replace(config, max_new_tokens=8))
    assert "3 pairs removed: cut at --max-new-tokens 8 they are equal" in capsys.readouterr().out
    config = dataclasses.replace(config, data=(write(tmp_path / "b.jsonl", alike),), out=str(tmp_path / "q"))
    with pytest.raises(UserError, match="no training rows are left"):
        training.train(dataclasses.replace(config, max_new_tokens=8))


def test_a_head_is_trained_on_texts_in_the_template_of_the_run(tiny, tmp_path, capsys, monkeypatch):
    read, encode = [], training.encode

    def kept(texts, tokenizer, limits):
        groups = encode(texts, tokenizer, limits)
        read.append(tokenizer.decode(groups[0].prompt))
        return groups

    monkeypatch.setattr(training, "encode", kept)
    own = tmp_path / "t.jinja"
    own.write_text("{% for m in messages %}{{ mark }}{{ m.content }}{% endfor %}")
    config = HeadConfig(
        data=(write(tmp_path / "p.jsonl", toy_pairs(4)),), out=str(tmp_path / "o"), model=tiny, layer=1,
        template=str(own), chat_template_kwargs=("mark=>",), system="",
    )  # fmt: skip
    training.train(config)
    assert read[0].startswith(">Question ") and read[0].endswith("?")
    assert f"note: --template {own} replaces the chat template" in capsys.readouterr().out
    for change, says in (({"template": "none"}, "--template none"), ({"chat_template_kwargs": ("x",)}, "x")):
        with pytest.raises(UserError, match=says):
            training.train(dataclasses.replace(config, out=str(tmp_path / "p"), **change))


def test_one_class_or_one_prompt_is_refused(tmp_path):
    out = str(tmp_path / "o")
    rows = [dict(row, label=1) for row in toy_labels(5)]
    with pytest.raises(UserError, match="both classes"):
        training.train(HeadConfig(data=(write(tmp_path / "a.jsonl", rows),), out=out))
    with pytest.raises(UserError, match="one prompt"):
        training.train(HeadConfig(data=(write(tmp_path / "b.jsonl", [GOOD]),), out=out))


class Words:
    """A tokenizer of one token per word."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [7 for _ in text.split()]


@pytest.mark.parametrize(
    ("words", "finished", "expected"),
    [(3, True, [7, 7, 7, 2]), (3, False, [7, 7, 7]), (4, True, [7, 7, 7, 7]), (9, True, [7, 7, 7, 7])],
)
def test_stop_token_only_where_it_fits(words, finished, expected):
    text, prompt = Text("", "w " * words, finished), Written("q ", [], [7])
    assert response_ids(text, prompt, Words(), "", 4, end=2) == expected


def test_auc_and_calibration_closed_forms():
    label = torch.tensor([0, 0, 1, 1])
    assert auc(torch.tensor([0.0, 1.0, 1.0, 2.0]), label) == pytest.approx(3.5 / 4)
    assert calibration_error(torch.tensor([0.1, 0.1, 1.0, 1.0]), label) == pytest.approx(0.05)
    assert calibration_error(torch.tensor([0.5, 0.55, 0.52, 0.51]), label) == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize("name", ["helpfulness", "harm", "harm-audit"])
def test_shipped_heads(name):
    loaded = Head.load(HEADS / name)
    assert loaded.name == name
    assert 0 < loaded.layer <= 15, "a run shares only the lower half of the 30 layers"
    assert loaded.weight_D.shape == (576,)
    assert loaded.weight_D.isfinite().all()
    figures = json.loads((HEADS / name / "metrics.json").read_text())
    assert figures["layer"] == loaded.layer
    assert all(gate["passed"] for gate in figures["gates"].values())
    text = (HEADS / name / "README.md").read_text()
    assert loaded.trunk in text
    assert "licence" in text.lower()


def test_the_auditor_is_another_head():
    harm, audit = Head.load(HEADS / "harm"), Head.load(HEADS / "harm-audit")
    assert harm.layer != audit.layer
    assert harm.trunk == audit.trunk


def test_the_flags_need_no_torch():
    program = "import sys, engine.scorers.head_config; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        == "False\n"
    )
