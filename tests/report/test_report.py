"""The report: a pure function of the run folder, deterministic, self-contained, escaped,
and sensible where files are missing."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
import torch

from engine.constraints import Improvement, Judged, Rate, word
from engine.errors import NotWritten, UserError
from engine.intervals import estimate
from engine.report import panels, run_page
from engine.report.run_files import FILES, read
from engine.report.run_page import _page
from engine.verdict.evaluation import Evaluation, Look
from tests.helpers.pictures import in_pixels
from tests.helpers.rows import DUAL, ITERATION, REFERENCE, STEP, write_metrics


def _run_folder(
    folder: Path, *, names: tuple[str, ...] = ("harm",), iterations: int = 3, prompts: int = 20
) -> Path:
    """Writes a synthetic CAID run with seeded numbers; one prompt and one answer
    try to break out of the page."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    n, config = (
        len(names),
        {
            "model": "org/model-135M",
            "cost": list(names),
            "threshold": [0.3] * len(names),
            "beta": 1.0,
            "out": str(folder),
        },
    )
    se, b, aim = [0.06] * n, [0.3] * n, [0.48] * n
    reference = replace(REFERENCE, names=list(names), prompts=prompts, responses=16, reward_sd=1.234)
    reference = replace(reference, finished=0.93, utility_sd=[0.4] * n, correlation=[-0.4] * n)
    reference = replace(reference, needed=b, aimed=aim, aim=aim)
    dual = replace(DUAL, lam=[1.1] * n, lam_low=[0.9] * n, lam_high=[1.3] * n, lam_se=[0.1] * n, ess=5.13)
    dual = replace(dual, predicted_improvement=aim, predicted_improvement_se=se, improvement_at_zero=se)
    rows = [reference, replace(dual, aim=aim, threshold=b)]
    for t in range(1, iterations + 1):
        noise = torch.rand(24).tolist()
        losses = [0.69 - 0.01 * i + 0.03 * noise[i] for i in range(24)]
        rows += [replace(STEP, iteration=t, step=i, loss=loss) for i, loss in enumerate(losses, 1)]
        gain = [0.15 * t + 0.1 * j for j in range(n)]
        row = replace(ITERATION, iteration=t, lam=[1.1 - 0.1 * t + 0.4 * j for j in range(n)], kl=1.5 * t)
        row = replace(row, reward=0.2 + 0.05 * t, improvement=gain, slack=[x - 0.48 for x in gain])
        rows.append(replace(row, improvement_se=se, slack_se=se, threshold=b, aim=aim))
    before, after = (
        torch.randn(prompts, 8, n + 2, dtype=torch.float64),
        torch.randn(prompts, 8, n + 2, dtype=torch.float64) + 0.6,
    )
    change = (after - before).mean(1)
    constraints = [estimate(change[:, j]) for j in range(n)]
    evaluation = Evaluation(
        reward=estimate(change[:, n]),
        constraints=tuple(
            Judged(Improvement(name=name, value=0.3), 0.48, e, word(e, 0.3))
            for name, e in zip(names, constraints, strict=True)
        ),
        audits=(("harm-audit", estimate(change[:, n + 1])),),
        kl=estimate(torch.rand(prompts) + 3),
        finished=(0.9, 0.95),
        mean_length=(38.2, 35.1),
        refusal_harmless=(0.01, 0.02),
        n_prompts=prompts,
        n_responses=8,
    )
    heldout = [
        {
            "prompt": f"Question {p} <script>alert(1)</script>",
            "kind": "delicate" if p % 2 else "everyday",
            "sample": i,
            "reference": f"Answer {p}.{i} & \"so\" <img src='http://elsewhere.example/x.png'>",
            "policy": "I'm sorry, but let us talk. " * 4,
            "reference_reward": before[p, i, n].item(),
            "policy_reward": after[p, i, n].item(),
            "reference_utility": before[p, i, :n].tolist(),
            "policy_utility": after[p, i, :n].tolist(),
            "reference_audit": [before[p, i, n + 1].item()],
            "policy_audit": [after[p, i, n + 1].item()],
            "reference_finished": True,
            "policy_finished": i % 2 == 1,
        }
        for p in range(prompts)
        for i in range(8)
    ]
    (folder / "config.json").write_text(
        json.dumps({"algorithm": "caid", "config": config, "versions": {"torch": "0"}})
    )
    write_metrics(folder, rows)
    (folder / "evaluation.json").write_text(json.dumps(evaluation.as_dict()))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    return folder


class _Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module", autouse=True)
def whole_pictures() -> Iterator[None]:
    with in_pixels():
        yield


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, str]:
    folder = _run_folder(tmp_path_factory.mktemp("report") / "run")
    png, html = run_page.write(folder)
    return folder, png.read_bytes(), html.read_text(encoding="utf-8")


def test_equal_files_give_equal_bytes_elsewhere_and_under_another_style(rendered, tmp_path):
    _, png, html = rendered
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True}):
        paths = run_page.write(_run_folder(tmp_path / "another" / "place"))
    assert [path.name for path in paths] == ["report.png", "report.html"]
    assert paths[0].read_bytes() == png
    assert paths[1].read_text(encoding="utf-8") == html


def test_the_picture_shows_the_numbers(rendered, tmp_path):
    folder, png, _ = rendered
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["lam"] = [2.0]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = run_page.write(copy)[0]
    assert changed.read_bytes() != png
    height, width = matplotlib.image.imread(changed).shape[:2]
    assert (width, height) == (1560, 1170)


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing(rendered):
    page = _Page(rendered[2])
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    loads = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in {"src", "href", "srcset", "action", "data"}
    ]
    assert not [value for value in loads if "http" in value]
    assert "url(" not in rendered[2] and "@import" not in rendered[2]


def test_texts_are_escaped_and_still_readable(rendered):
    page = _Page(rendered[2])
    assert "<script" not in rendered[2]
    assert "Question 1 <script>alert(1)</script>" in page.text
    assert "Answer 1.0 & \"so\" <img src='http://elsewhere.example/x.png'>" in page.text


def test_ten_delicate_and_six_everyday_prompts_with_scores_of_both_sides(rendered):
    folder, _, html = rendered
    page = _Page(html)
    assert [attrs.get("class") for _, attrs in page.tags].count("sample") == 16
    assert [f"Question {p} " in page.text for p in range(20)] == [p % 2 == 1 or p < 12 for p in range(20)]
    row = json.loads((folder / "heldout.jsonl").read_text().splitlines()[0])
    for side, name in (("reference", "Before"), ("policy", "After")):
        utility, audit = row[f"{side}_utility"][0], row[f"{side}_audit"][0]
        assert (
            f"{name}: reward {row[f'{side}_reward']:.2f}, utility harm {utility:.2f}, utility "
            f"harm-audit {audit:.2f}" in page.text
        )


def test_tables_and_settings(rendered):
    folder, _, html = rendered
    page = _Page(html)
    assert "0.35 ± 0.05" in page.text and "-0.03 ± 0.06" in page.text and "org/model-135M" in page.text
    assert str(folder) not in html and "versions" not in page.text


def test_the_note_has_the_duals_effective_sample_size(rendered, tmp_path):
    warm = "Warm start of the dual: lambda 1.100, predicted improvement 0.48"
    assert f"{warm}, effective sample size 5.1 of 16." in _Page(rendered[2]).text
    folder = tmp_path / "run"
    shutil.copytree(rendered[0], folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "ess"} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert f"{warm}." in _Page(run_page.write(folder)[1].read_text(encoding="utf-8")).text


@pytest.mark.parametrize("words", [("met", "met"), ("met", "not resolved"), ("not resolved", "not met")])
def test_the_box_has_the_colour_of_the_worst_word(rendered, tmp_path, words):
    folder = tmp_path / "run"
    folder.mkdir()
    evaluation = json.loads((rendered[0] / "evaluation.json").read_text())
    evaluation["constraints"] = [
        {**evaluation["constraints"][0], "name": f"c{i}", "word": w, "holds": w == "met"}
        for i, w in enumerate(words)
    ]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = _Page(_page(read(folder), b""))
    assert ("div", {"class": "verdict " + words[1].replace(" ", "-")}) in page.tags
    assert all(f"constraint c{i}: {w} (" in page.text for i, w in enumerate(words))


def test_the_colour_is_that_of_the_word_for_all_constraints(rendered, tmp_path):
    """Each constraint's own bound may confirm it where the corrected ones of single words do not."""
    folder = tmp_path / "run"
    folder.mkdir()
    evaluation = json.loads((rendered[0] / "evaluation.json").read_text())
    alone = {**evaluation["constraints"][0], "word": "not resolved", "holds": True}
    evaluation["constraints"] = [{**alone, "name": name} for name in ("a", "b")]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = _Page(_page(read(folder), b""))
    assert ("div", {"class": "verdict met"}) in page.tags


def test_each_constraint_has_a_panel_of_its_looks(tmp_path, monkeypatch):
    folder = _run_folder(tmp_path / "run", names=("harm", "toxicity"))
    evaluation = Evaluation.read(folder / "evaluation.json", cure="")
    harm, toxicity = evaluation.constraints
    toxicity = replace(
        toxicity, limit=Rate(name="toxicity", value=0.05), measured=toxicity.estimate, reference=0.2
    )
    looks = [
        Look(
            prompts=p, responses=6, share=0.1, planned=3, means=(0.4, 0.03),
            bounds=((0.3 - 6 / p, 0.5 + 6 / p), (0.02, 0.04)), words=("not resolved", "met"),
        )
        for p in (96, 192, 384)
    ]  # fmt: skip
    evaluation = replace(evaluation, constraints=(harm, toxicity), looks=tuple(looks))
    (folder / "evaluation.json").write_text(json.dumps(evaluation.as_dict()))
    shown = []
    monkeypatch.setattr(panels, "png", lambda draw: shown.append(draw()) or b"")
    panels.picture(read(folder))
    axes = {axis.get_title(loc="left")[4:]: axis for axis in shown[0].axes if axis.axison}
    assert list(axes)[-3:] == ["Training loss", "Looks: harm", "Looks: toxicity"]
    for name, mean, lower, upper, asked in (
        ("harm", 0.4, [0.3 - 6 / p for p in (96, 192, 384)], [0.5 + 6 / p for p in (96, 192, 384)], 0.3),
        ("toxicity", 3, [2] * 3, [4] * 3, 5),
    ):
        axis = axes[f"Looks: {name}"]
        ((means, _, (bars,)),) = axis.containers
        assert means.get_xydata().tolist() == [[576, mean], [1152, mean], [2304, mean]]
        ends = [[segment[0][1], segment[1][1]] for segment in bars.get_segments()]
        assert ends == [pytest.approx(pair) for pair in zip(lower, upper, strict=True)]
        assert [asked, asked] in [list(line.get_ydata()) for line in axis.lines]
    assert [text.get_text() for text in axes["Looks: harm"].texts] == ["not resolved"] * 3
    # A run without looks has no such panel.
    _run_folder(tmp_path / "old")
    panels.picture(read(tmp_path / "old"))
    assert not [axis for axis in shown[1].axes if "Looks" in axis.get_title(loc="left")]


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_leaves_the_rest(rendered, tmp_path, missing):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in FILES:
        if name != missing:
            shutil.copy(rendered[0] / name, folder)
    page = _Page(run_page.write(folder)[1].read_text(encoding="utf-8"))
    assert ("CAID on org/model-135M" in page.text) == (missing != "config.json")
    assert ("No iteration was finished" in page.text) == (missing == "metrics.jsonl")
    assert ("No verdict" in page.text) == (missing == "evaluation.json")
    assert ("No held-out responses" in page.text) == (missing == "heldout.jsonl")


@pytest.mark.parametrize(
    ("algorithm", "shown"), [("pd_dpo", "Our reading of PD-DPO"), ("mocan", "MoCAN"), ("safe_dpo", "SafeDPO")]
)
def test_the_title_calls_a_reading_a_reading(tmp_path, algorithm, shown):
    (tmp_path / "config.json").write_text(
        json.dumps({"algorithm": algorithm, "config": {"model": "org/model-135M"}})
    )
    assert read(tmp_path).title == f"{shown} on org/model-135M"


def test_a_stopped_run_with_a_cut_off_line_and_null_values(rendered, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    iteration = replace(ITERATION, reward=math.nan, improvement=[math.nan], slack=[math.nan], kl=math.nan)
    steps = [replace(STEP, step=1, loss=math.nan), replace(STEP, step=2, loss=0.5)]
    shutil.copy(rendered[0] / "config.json", folder)
    lines = [json.dumps(row.as_dict()) for row in [*steps, iteration]]
    assert '"loss": null' in lines[0] and '"improvement": [null]' in lines[2]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "ste')
    page = _Page(run_page.write(folder)[1].read_text(encoding="utf-8"))
    assert "No verdict" in page.text and "harm: slack" in page.text
    (folder / "metrics.jsonl").write_text('{"kind": "ste\n' + lines[0] + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        run_page.write(folder)


def test_a_full_disk_keeps_the_older_report_and_is_one_line(tmp_path, monkeypatch):
    folder = _run_folder(tmp_path / "run", iterations=1, prompts=4)
    before = [path.read_bytes() for path in run_page.write(folder)]

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritten, match="disk full while saving .*report.png .*; free space$"):
        run_page.write(folder)
    monkeypatch.undo()
    assert [(folder / name).read_bytes() for name in ("report.png", "report.html")] == before
    assert not list(folder.glob("*.tmp"))


def test_a_verdict_that_is_cut_or_no_verdict_is_one_line(tmp_path):
    folder = _run_folder(tmp_path / "run", iterations=1, prompts=4)
    path = folder / "evaluation.json"
    whole = path.read_text()
    for text, says in (
        (whole[:50], "not valid JSON"),
        ("{}", "not a whole evaluation .KeyError"),
        ('{"refusal_harmless": 1, "reward": 3}', "not a whole evaluation .TypeError"),
        ("[]", "a JSON list, not an object"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"evaluation.json: {says}.*; resume the run") as caught:
            run_page.write(folder)
        assert "\n" not in str(caught.value)


def test_one_iteration_and_three_constraints_with_odd_names(tmp_path):
    names = ("$\\frac$ <b>", "module.with.a.long.path:function_of_harm", "harm")
    png, html = run_page.write(_run_folder(tmp_path / "run", names=names, iterations=1, prompts=4))
    page = _Page(html.read_text(encoding="utf-8"))
    assert all(f"constraint {name}: " in page.text and f"{name}: lambda" in page.text for name in names)
    assert matplotlib.image.imread(png).shape[:2] == (1755, 1560)


def test_a_folder_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        run_page.write(tmp_path / "nowhere")
