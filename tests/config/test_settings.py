"""Bounds of settings: every number has two, and what lies outside is refused before a run begins."""

import math
import re
import typing
from dataclasses import fields

import pytest

from engine import train
from engine.config import ALGORITHMS, EvaluateConfig, check
from engine.config.bounds import MOST, Range, _bound, check_bounds
from engine.dual.__main__ import main as dual_main
from engine.dual.config import DualConfig
from engine.errors import UserError
from engine.scorers.head_config import HeadConfig
from tests.helpers.runs import SMOKE, write

CONFIGS = [row.config for row in ALGORITHMS.values() if row.trains_policy]
CONFIGS += [EvaluateConfig, DualConfig, HeadConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_number_has_a_lower_and_an_upper_bound(config):
    kinds, without = typing.get_type_hints(config), []
    for field in fields(config):
        numbers = {int, float} & {kinds[field.name], *typing.get_args(kinds[field.name])}
        bound = _bound(config, field.name)
        defaults = field.default if isinstance(field.default, tuple) else (field.default,)
        if numbers and not (isinstance(bound, Range) and all(map(bound.holds, defaults))):
            without.append(field.name)
        elif numbers:
            assert not bound.holds(math.nan) and not bound.holds(-math.inf) and not bound.holds(2e100)
    assert without == []


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--temperature 1e-8", r"--temperature 1e-08: must lie in \[1e-06, 1e\+06\], as the policy"),
        ("--temperature 1e7", r"--temperature 10000000\.0: must lie in \[1e-06, 1e\+06\]"),
        (f"--seed {2**63}", r"--seed 9223372036854775808: must lie in \[-68719476736, 68719476736\]"),
        (f"--threads {2**40}", r"--threads 1099511627776: must lie in \[0, 1024\]"),
        ("--learning-rate 1e300", r"--learning-rate 1e\+300: must lie in \(0, 10\]"),
        ("--threshold 1e308", r"--threshold 1e\+308: must lie in \[-1e\+06, 1e\+06\]"),
        ("--cost-mean -1e308", r"--cost-mean -1e\+308: must lie in \[-1e\+100, 1e\+100\], or be inf"),
        ("--unsafe-above 1e200", r"--unsafe-above 1e\+200: must lie in \[-1e\+100, 1e\+100\]"),
        ("--lora-rank 1000000000000", r"--lora-rank 1000000000000: must lie in \[1, 65536\]"),
        (f"--n-prompts {10**10}", r"--n-prompts 10000000000: must lie in \[2, 1000000000\]"),
        ("--n-prompts 1", "--n-prompts 1: must be at least 2, as one prompt has no standard error"),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_a_run_folder_is_made(tmp_path, capsys, flags, said):
    assert train.main([*SMOKE, *flags.split(), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {said}", line)
    assert not (tmp_path / "run").exists()


def test_infinity_is_accepted_where_it_limits_nothing():
    caid = ALGORITHMS["caid"].config
    check(caid(max_kl=math.inf, cost_mean=(math.inf,)))
    for wrong in ({"max_kl": -math.inf}, {"cost_mean": (-math.inf,)}, {"beta": math.inf}):
        with pytest.raises(UserError):
            check(caid(**wrong))


def test_the_bounds_themselves_are_accepted():
    caid = ALGORITHMS["caid"].config
    check_bounds(caid(seed=2**36, threads=1024, n_responses=MOST, temperature=1e-6, beta=1e8))
    check_bounds(caid(seed=-(2**36), temperature=1e6, beta=1e-8))


def test_the_dual_has_the_same(tmp_path, capsys):
    file = tmp_path / "s.jsonl"
    rows = [{"prompt": i // 2, "reward": 1e200 if i == 0 else i, "u": i % 2} for i in range(4)]
    write(file, rows)
    assert dual_main([str(file), "--threshold", "0.1", "--seed", str(2**63)]) == 2
    assert f"--seed {2**63}: must lie in [0, {2**63 - 1}]." in capsys.readouterr().err
    assert dual_main([str(file), "--threshold", "0.1", "--out", str(tmp_path / "o")]) == 2
    said = "s.jsonl:1: column 'reward' is 1e+200; it must be finite, and at most 1e+100 in size"
    assert said in capsys.readouterr().err
