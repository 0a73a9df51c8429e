"""Files of response pairs: what is read, what is refused by row, and runs that learn from
them (--pairs, --preferences)."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from engine import train
from engine.config import CaidConfig, MocanConfig, check
from engine.data import tables
from engine.data.prompts import TextLimits, prompt_key, shipped_prompts
from engine.data.response_pairs import SURE, read_response_pairs
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.folder import read_config
from engine.policy.samples import Samples
from engine.records import Prompts
from engine.run.rows import PairsRow, PairStepRow, StepRow, read_rows
from engine.stages.job import deal_prompts
from engine.stages.update import Updates
from tests.helpers.runs import SMOKE, files, write

ROWS = [{"prompt": f"Say {i}.", "response_0": "aaaa" * (i + 1), "response_1": "bbb"} for i in range(8)]


@pytest.fixture(scope="module")
def reader(tiny_folder):
    """Returns `read_response_pairs` with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    shape = ModelConfig.from_json(read_config(tiny_folder), tiny_folder / "config.json")
    limits = TextLimits(
        system="", max_positions=shape.max_positions, max_new_tokens=8, vocab_size=shape.vocab_size
    )
    return lambda file, columns=(): read_response_pairs(file, columns, tokenizer, limits)


def test_pairs_of_a_file_and_their_labels(reader, tmp_path):
    rows = [row | {"reward": i % 2, "harm": "1"} for i, row in enumerate(ROWS)]
    found = reader(write(tmp_path / "p.jsonl", rows), ["reward", "harm"])
    assert found.prompts.text == [row["prompt"] for row in rows] and found.prompts.key_P.tolist() == list(
        range(8)
    )
    # Cut at 8 tokens where they are longer, the stop token in it where they are not.
    assert found.rollouts.n == 2 and found.rollouts.length.max() == 8 and found.texts[1] == "bbb"
    assert found.rollouts.finished.tolist() == [length < 8 for length in found.rollouts.length.tolist()]
    assert found.label_PGO.shape == (8, 2, 2)
    assert found.label_PGO[:, 1, 0].tolist() == [SURE if i % 2 else -SURE for i in range(8)]
    assert (found.label_PGO[:, 0] == -found.label_PGO[:, 1]).all() and (
        found.label_PGO[:, 1, 1] == SURE
    ).all()
    other = [
        {"prompt": row["prompt"], "chosen": row["response_0"], "rejected": row["response_1"]} for row in ROWS
    ]
    same = reader(write(tmp_path / "o.jsonl", other))
    assert torch.equal(same.rollouts.tokens, found.rollouts.tokens) and same.label_PGO.shape == (8, 2, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, "p.jsonl:2: empty prompt in column 'prompt'"),
        ({"prompt": " "}, "p.jsonl:2: empty prompt in column 'prompt'"),
        ({"response_1": None}, "p.jsonl:2: response_1 is None; give text"),
        ({"response_0": ["a"]}, r"p.jsonl:2: response_0 is \['a'\]; give text"),
        ({"response_0": 3.5}, "p.jsonl:2: response_0 is 3.5; give text"),
        ({"harm": 2}, "p.jsonl:2: harm is 2; give 0 or 1"),
        ({"harm": None}, "p.jsonl:2: harm is None; give 0 or 1"),
        ({"prompt": "long " * 600}, "p.jsonl:2: the prompt has [0-9]+ tokens, the limit is"),
    ],
)
def test_rows_that_cannot_be_used_are_named(reader, tmp_path, change, said):
    rows = [ROWS[0] | {"harm": 0}, ROWS[1] | {"harm": 1} | change]
    with pytest.raises(UserError, match=said):
        reader(write(tmp_path / "p.jsonl", rows), ["harm"])
    for name in ("prompt", "response_1", "harm"):
        with pytest.raises(UserError, match=f"p.jsonl:1: no column '{name}'"):
            reader(write(tmp_path / "p.jsonl", [{k: v for k, v in rows[0].items() if k != name}]), ["harm"])
    with pytest.raises(UserError, match="no column 'rejected'"):
        reader(write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b"}]))


def test_settings_that_do_not_go_with_pairs_are_refused():
    with pytest.raises(UserError, match="--pairs policy: a one-shot method starts at the reference"):
        check(MocanConfig(pairs="policy"))
    for pairs in ("policy", "p.jsonl"):
        with pytest.raises(UserError, match=f"--labels single: .* --pairs is {pairs}"):
            check(CaidConfig(pairs=pairs, labels="single"))


def heldout_prompt() -> str:
    return next(tables.read_rows(shipped_prompts("heldout")[0]))[1]["prompt"]


@pytest.mark.parametrize(
    ("flags", "rows", "said"),
    [
        (
            ["caid", "--strict", "--pairs"],
            ROWS[:1] + [ROWS[1] | {"prompt": None}],
            "own.jsonl:2: empty prompt in column 'prompt'",
        ),
        (["mocan", "--pairs"], [{"prompt": "a", "response_0": "b"}], "no column 'response_1'"),
        (["mocan", "--eval-prompts", "40", "--cost-on", "delicate", "--pairs"], ROWS, "0 of the 6 rows of"),
        (["caid", "--strict", "--pairs"], "held out", "is also a prompt of --pairs"),
        (["pecan", "--strict", "--preferences"], "held out", "is also a prompt of --preferences"),
    ],
)
def test_a_file_is_refused_before_any_compute(tmp_path, capsys, flags, rows, said):
    if rows == "held out":
        rows = [ROWS[0] | {"prompt": heldout_prompt(), "reward": 0, "harm": 1}]
    file = write(tmp_path / "own.jsonl", rows)
    assert train.main([flags[0], *SMOKE, *flags[1:], file, "--out", str(tmp_path / "r")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_run_says_what_it_leaves_out_and_that_top_p_measures_no_kl(tmp_path, capsys):
    rows = [*ROWS, {"prompt": "q", "response_0": "a long answer", "response_1": "a long answer, too"}]
    file, out = write(tmp_path / "own.jsonl", rows), tmp_path / "r"
    flags = ["--pairs", file, "--top-p", "0.5", "--iterations", "1", "--steps", "1", "--eval-prompts", "2"]
    with pytest.raises(UserError, match="--max-kl 2: no KL is measured with --top-p 0.5"):
        check(CaidConfig(max_kl=2.0, top_p=0.5))
    with pytest.raises(UserError, match="no KL is measured with --top-k 50 and --top-p 0.5, as"):
        check(CaidConfig(max_kl=2.0, top_p=0.5, top_k=50))
    check(CaidConfig(max_kl=2.0))
    assert CaidConfig(top_k=50).truncated and not CaidConfig().truncated
    assert train.main(["caid", *SMOKE, *flags, "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "with --top-p 0.5 the distributions that are sampled are cut, so no KL is measured" in said
    assert f"1 of {len(rows)} pairs have equal answers and were left out" in said
    assert f"of {2 * len(rows)} answers are longer than --max-new-tokens 8 and were cut" in said
    assert "| log-ratio " in said and "| KL " not in said and "KL(policy || reference)" not in said
    assert json.loads((out / "evaluation.json").read_text())["truncated"] is True


def steps_of(folder: Path) -> list[tuple[int, float]]:
    steps = [row for row in read_rows(folder, StepRow) if row.stage.startswith("iteration")]
    return [(row.iteration, row.loss) for row in steps]


def test_updates_learn_from_the_policys_own_samples_and_end_equal_after_a_kill(tmp_path):
    flags = [*SMOKE, "--iterations", "2", "--seed", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "reference")]) == 0
    assert train.main([*flags, "--pairs", "policy", "--out", str(tmp_path / "whole")]) == 0
    reference, own = steps_of(tmp_path / "reference"), steps_of(tmp_path / "whole")
    # The first update starts at the reference, whose samples are there; the second one's are others.
    assert own[:3] == reference[:3] and all(a != b for a, b in zip(own[3:], reference[3:], strict=True))

    pid = os.fork()
    if not pid:
        from engine.run.run import Stage

        save_partial = Stage.save_partial

        def killed(self, record):
            save_partial(self, record)
            if self.name == "iteration-2/policy":
                os.kill(os.getpid(), signal.SIGKILL)

        Stage.save_partial = killed
        train.main([*flags, "--pairs", "policy", "--out", str(tmp_path / "killed")])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "killed" / "stages").glob("*iteration-2-policy.partial*"))
    assert train.main(["--resume", str(tmp_path / "killed")]) == 0
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and [name for name in whole if whole[name] != resumed[name]] == []


def asked(texts: list[str], tokens: list[list[int]], keys: list[int]) -> Prompts:
    return Prompts(text=texts, kind=[""] * len(texts), token_ids=tokens, key_P=torch.tensor(keys))


def test_rows_whose_prompt_measures_the_slack_are_left_out_however_it_is_written():
    tokens = [[i, i + 1] for i in range(6)]
    own = asked([f"Say {i}" for i in range(6)], tokens, [prompt_key(ids) for ids in tokens])
    config = replace(CaidConfig(), pairs="p.jsonl", steps=2, prompts_per_step=2, slack_prompts=2)
    first, second = deal_prompts(config, own, 1)[1]

    def trained_on(texts: list[str], ids: list[list[int]]) -> list[int]:
        rows = Samples(
            prompts=asked(texts, ids, list(range(len(texts)))),
            rollouts=None, texts=[], scores=None, kl_PG=None,
        )  # fmt: skip
        job = SimpleNamespace(config=config, pairs=rows)
        reference = SimpleNamespace(prompts=own, scoring=lambda stage, samples: None)
        weights = SimpleNamespace(tensors=dict)
        return sorted(Updates(job, reference, weights, rows)._learned_from(None, None, 1)[1])

    # In another case, in equal tokens, and two prompts that are none of these.
    texts = [f"say   {first} ", "Another text", "New", "Newer"]
    assert trained_on(texts, [[90], tokens[second], [91], [92]]) == [2, 3]
    with pytest.raises(UserError, match="--pairs p.jsonl: every prompt of iteration 1 measures its slack"):
        trained_on([f"SAY {first}"], [[90]])


def test_updates_learn_from_a_files_pairs(tmp_path):
    """The names chosen and rejected say nothing, but the run's scores do;
    PeCAID scores pairs by its log-ratios."""
    chosen = [
        {"prompt": row["prompt"], "chosen": row["response_0"], "rejected": row["response_1"]} for row in ROWS
    ]
    turned = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in chosen
    ]
    losses = []
    for name, rows in (("a", ROWS), ("b", chosen), ("c", turned)):
        # Of 8 rows those are scored that 3 steps of 2 prompts can take.
        file = write(tmp_path / f"{name}.jsonl", rows)
        assert train.main(["mocan", *SMOKE, "--pairs", file, "--out", str(tmp_path / name)]) == 0
        assert [row.prompts for row in read_rows(tmp_path / name, PairsRow)] == [6]
        losses.append([loss for _, loss in steps_of(tmp_path / name)])
        pairs = {row.pairs for row in read_rows(tmp_path / name, PairStepRow)}
        assert pairs == {2}, "two prompts a step, a pair each"
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], rel=1e-4)
    flags = [
        "--scores",
        "preference",
        "--preference-steps",
        "1",
        "--iterations",
        "1",
        "--force",
        "--pairs",
        str(tmp_path / "a.jsonl"),
    ]
    assert train.main(["caid", *SMOKE, *flags, "--out", str(tmp_path / "pecaid")]) == 0
    by_ratios = [loss for _, loss in steps_of(tmp_path / "pecaid")]
    assert len(by_ratios) == 3 and by_ratios[0] != losses[0][0]
    assert json.loads((tmp_path / "pecaid" / "evaluation.json").read_text())["n_prompts"] == 8
