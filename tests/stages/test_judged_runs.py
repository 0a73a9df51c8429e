"""Runs that a judge behind HTTP scores: one whose judge went away goes on when it is back, asks nothing
twice and ends as if nothing had happened."""

import json
import shutil

import pytest

from engine import evaluate, train
from engine.scorers import remote
from engine.scorers.scoring import TRIAL
from tests.helpers.judges import JudgeServer, away, rewards
from tests.helpers.runs import SMOKE, files

CACHE = "judge-cache.jsonl"


@pytest.fixture(scope="module")
def server():
    server = JudgeServer()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", remote.KEY):
            patch.delenv(name, raising=False)
        patch.setattr(remote, "PATIENCE_S", 0.0)
        patch.setattr(remote, "PATIENCE_AT_FIRST_S", 0.0)
        yield server
    server.close()


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory, cache):
    """Makes a run by the judge; returns its folder and the texts that the judge was asked for."""
    folder = tmp_path_factory.mktemp("judged") / "a"
    assert train.main(command(server, folder)) == 0
    return folder, list(server.queries)


def command(server, out):
    return ["mocan", *SMOKE, "--reward", f"{server.url}/score", "--out", str(out)]


def cached(folder):
    return [json.loads(line) for line in (folder / CACHE).read_text().splitlines()]


def test_a_run_keeps_what_its_judge_has_answered(finished):
    folder, queries = finished
    kept = [row["score"] for row in cached(folder)]
    assert len(kept) == len(queries) == len(set(queries)) > 80
    assert sorted(kept) == sorted(rewards({"query": queries})["rewards"])
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["reward"].startswith("http://127.0.0.1:")


@pytest.mark.parametrize("answered", [0, 3])
def test_a_run_whose_judge_stays_down_goes_on_when_it_is_back(server, finished, tmp_path, capsys, answered):
    server.forget()
    server.first, server.answer = [rewards] * answered, away
    out = tmp_path / "b"
    assert train.main(command(server, out)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: scorer {server.url}/score: it does not answer (503 Service Unavailable")
    if answered == 0:  # not even what is tried before anything is sampled
        assert said.endswith("see to that server and start the command again") and not out.exists()
        return
    assert said.endswith(f"see to that server and go on with python -m engine.train --resume {out}")
    before = [q for body in server.bodies[:answered] for q in body["query"]]
    assert len(cached(out)) == len(before)
    server.forget()
    assert train.main(["--resume", str(out)]) == 0
    assert sorted(before + server.queries) == sorted(finished[1])
    first, second = files(finished[0]), files(out)
    assert first.keys() == second.keys() and [name for name in first if first[name] != second[name]] == []


def test_an_evaluation_asks_only_for_what_the_run_has_not_asked(server, finished, tmp_path):
    server.forget()
    run = shutil.copytree(finished[0], tmp_path / "run")
    assert evaluate.main([str(run), "--seed", "0", "--out", str(tmp_path / "e")]) == 0
    # With the run's seed the responses are those of its verdict: only what is tried at first is new.
    assert len(server.queries) == len(TRIAL)
    assert evaluate.main([str(run), "--seed", "1", "--out", str(tmp_path / "f")]) == 0
    assert len(server.queries) > 10 + len(TRIAL)
    assert len(cached(run)) == len(finished[1]) + len(server.queries)
