"""The command line of engine.train: flags, presets, resume, one-line errors before anything
heavy is imported, exit codes."""

import ast
import inspect
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import train as cli
from engine.config import (
    ALGORITHMS,
    CaidConfig,
    MocanConfig,
    algorithms,
    check,
    fit,
    kinds,
    run,
    safe_rlhf,
    shown_name,
    smoke,
    with_steps,
)
from engine.config.help import GROUPS, USUAL
from engine.errors import Interrupted, NonFiniteError, NotWritten, UserError

ROOT = Path(cli.__file__).parent.parent
RUN_FLAGS = """
    out seed device dtype threads model-ranks force trackers model reward cost audit offload-scorers prompts
    heldout prompt-column response-columns strict system template chat-template-kwargs accept-changes samples
    samples-of n-prompts n-responses max-new-tokens temperature top-p top-k rollout-rows threshold units
    cost-mean cost-rate unsafe-above cost-worst worst-share cost-range cost-on beta margin lam-max steps
    prompts-per-step
    tokens-per-forward activation-checkpointing responses-per-prompt labels learning-rate warmup-steps
    schedule adam-beta1 weight-average weight-decay clip-norm least-weight max-kl-ratio
    tune lora-rank lora-alpha lora-from lora-targets lora-dropout
    memory-budget-mb checkpoint-every eval-prompts eval-responses eval-budget require-met
""".split()
ITERATIVE = [*RUN_FLAGS, *"iterations slack-prompts slack-responses lam-max-change max-kl".split()]
ASCENT = [*ITERATIVE, *"lam-init dual-rate advantage ascent-prompts clip".split()]
PREFERENCES = ["preferences", "preference-columns", "preference-steps"]
FLAGS = {
    "caid": [
        *ITERATIVE,
        *"dual-rule dual-step pairs epochs scores preferences preference-columns preference-steps".split(),
    ],
    "mocan": [*RUN_FLAGS, "pairs", "epochs"],
    "pecan": [*RUN_FLAGS, "pairs", "epochs", *PREFERENCES],
    "primal_dual": ASCENT,
    "repo": ASCENT,
    "opd": [*ITERATIVE, "lam-init", "dual-rate", "proximity"],
    "cdpo": [*ITERATIVE, "lam-init", "dual-rate"],
    "pd_dpo": [*ITERATIVE, "lam-init", "dual-rate"],
    "sacpo": [*RUN_FLAGS, "pairs", "epochs", "lam"],
    "safe_dpo": [*RUN_FLAGS, "pairs", "epochs", "offset"],
    "dpo": [*RUN_FLAGS, "pairs", "epochs", "objective"],
}
CONFIGS = {name: row.config_class for name, row in ALGORITHMS.items() if name != "head"}


@pytest.fixture
def trained(monkeypatch) -> list:
    """Puts stand-ins in place of the algorithms, which note (name, config, keywords) in a list
    and raise the list's `stop`."""

    class Calls(list):
        stop: BaseException | None = None

    calls = Calls()

    def stand_in(name: str) -> SimpleNamespace:
        def train(config, **keywords):
            calls.append((name, config, keywords))
            if calls.stop is not None:
                raise calls.stop

        return SimpleNamespace(train=train)

    for name in CONFIGS:
        monkeypatch.setitem(sys.modules, ALGORITHMS[name].module, stand_in(name))
    return calls


@pytest.fixture
def run_folder(tmp_path) -> str:
    from engine.run.run import Run

    config = MocanConfig(cost=("harm", "other"), threshold=(0.1, 0.2), steps=7)
    Run.create(
        tmp_path / "run", algorithm="mocan", config=asdict(config), versions={}, fingerprint="f"
    ).close()
    return str(tmp_path / "run")


def in_new_process(*argv: str) -> tuple[int, str, str, set[str]]:
    """Runs the command line in a fresh process; returns its exit code, stdout,
    stderr and the modules it imported."""
    program = (
        "import sys; from engine.train import main\ntry: code = main(sys.argv[1:])\nfinally: "
        "print('MODULES', *sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"COLUMNS": "100"},
    )
    stdout, _, modules = done.stdout.rpartition("MODULES")
    return done.returncode, stdout, done.stderr, set(modules.split())


def field_helps() -> dict[tuple[str, str], str]:
    """Returns the string under each field by (class, field), as the source has it."""
    helps = {}
    for module in (run, kinds, algorithms):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                for field, text in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                        helps[node.name, field.target.id] = ast.literal_eval(text.value)
    return helps


def flat(text: str) -> str:
    """Removes the box and the line breaks that the help is drawn with."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_flags_are_pinned(algorithm):
    assert sorted(field.name.replace("_", "-") for field in fields(CONFIGS[algorithm])) == sorted(
        FLAGS[algorithm]
    )


@pytest.mark.parametrize("algorithm", ["caid", "mocan", "primal_dual"])
def test_help_shows_every_flag_with_its_text_and_default(algorithm):
    code, out, _, modules = in_new_process(algorithm, "--help-all")
    assert code == 0
    assert not modules & {"torch", "transformers", "numpy"}
    helps, shown = field_helps(), flat(out)
    for field in fields(CONFIGS[algorithm]):
        text = next(
            helps[c.__name__, field.name]
            for c in CONFIGS[algorithm].__mro__
            if (c.__name__, field.name) in helps
        )
        default = shlex.join(map(str, field.default if isinstance(field.default, tuple) else [field.default]))
        assert f"--{field.name.replace('_', '-')} " in shown.replace(",", " ")
        assert f"{flat(text)} (default: {default})" in shown
    for name in ALGORITHMS:
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
    assert "safe-rlhf, hh-rlhf" in out
    assert "--resume RUN" in out


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_every_flag_has_a_subject_and_the_help_shows_the_usual_ones(algorithm, capsys):
    names = [name for group in GROUPS.values() for name in group]
    assert len(set(names)) == len(names) and {f.name for f in fields(CONFIGS[algorithm])} <= set(names)
    assert cli.main([algorithm, "--help"]) == 0
    usual = {f"--{name.replace('_', '-')}" for name in USUAL}
    _, text = capsys.readouterr().out.split(f"usage: python -m engine.train {algorithm} ")
    shown = set(re.findall(r"^\W+(--\w[\w-]*)", text, re.MULTILINE))
    assert shown == usual & {f"--{flag}" for flag in FLAGS[algorithm]} and 12 <= len(shown) <= 16


BAD = {
    "cadi": r"unknown algorithm 'cadi'\. Did you mean caid\? Choose from caid, mocan, pecan, .*, head\.",
    "--lamda-max 3": r"unknown flag --lamda-max\. Did you mean --lam-max\? See --help\.",
    "mocan --slack-prompts 3": r"unknown flag --slack-prompts\.",
    "-v": r"unknown flag -v\. See --help\.",
    "--no-forc": r"unknown flag --no-forc\. Did you mean --no-force\?",
    "--reset smoke": r"unknown flag --reset\. Did you mean --preset\?",
    "--steps 1.5": r"--steps 1\.5: must be a whole number\.",
    "--margin abc": r"--margin abc: must be a number\.",
    "--threshold 0.1 b": r"--threshold b: must be a number\.",
    "--steps": r"--steps without a value: takes one value",
    "--steps 1 2": r"--steps 1 2: takes one value",
    "--force yes": r"--force yes: takes no value; write --force alone\.",
    "--seed 1 --preset smoke mocan": r"--seed 1 mocan: takes one value",
    "--preset smoke mocan": r"unexpected word 'mocan'; the algorithm comes first",
    "--preset smok": r"--preset smok: there is none\. Did you mean smoke\? There are smoke, safe-rlhf, ",
    "head --preset smoke": r"--preset smoke: head has none; caid, mocan, .* have it",
    "--epochs 2": r"--epochs 2: it counts passes over data of --pairs, which is reference here",
    "--pairs a.csv --epochs 2 --steps 3": r"--steps and --epochs: both count the policy steps; give one",
    "dpo --pairs policy": r"--pairs policy: a one-shot method starts at the reference",
    "--pairs a.csv --slack-prompts 401": r"--slack-prompts 401: must be at most --n-prompts 400",
    "--lora-targets": r"--lora-targets is empty: name at least one of q, k, v, o, gate, up, down",
    "--lora-targets q lm_head": r"--lora-targets lm_head: must be one of q, k, v, o, gate, up, down",
    "primal_dual --lora-dropout 0.1": r"--lora-dropout 0\.1: a policy gradient compares the policy with",
    "--preset": r"--preset: a value is missing",
    "--preset --steps 3": r"--preset: a value is missing",
    "--resume some/run --steps 3": r"--resume some/run: takes no other flags, but got --steps;",
    "--steps 0": r"--steps 0: must lie in \[1, 1000000\]\.",
    "--margin -1": r"--margin -1\.0: must lie in \[0, 1e\+06\]\.",
    "--memory-budget-mb -1": r"--memory-budget-mb -1: must lie in \[0, 1000000000\]\.",
    "--learning-rate nan": r"--learning-rate nan: must be finite\.",
    "--threshold nan": r"--threshold nan: must be finite\.",
    "--threshold -inf": r"--threshold -inf: must be finite\.",
    "--beta inf": r"--beta inf: must be finite\.",
    "--unsafe-above nan": r"--unsafe-above nan: must be finite\.",
    "--margin inf": r"--margin inf: must be finite\.",
    "sacpo --lam nan": r"--lam nan: must be finite\.",
    "--max-kl nan": r"--max-kl nan: must lie in \(0, 1e\+09\]\.",
    "mocan --max-kl 3": r"unknown flag --max-kl\.",
    "--preferences p.jsonl": r"--preferences p\.jsonl: scores are those "
    r"of models here; add --scores preference",
    "--n-prompts 1": r"--n-prompts 1: must be at least 2",
    "--eval-prompts 1": r"--eval-prompts 1: must be at least 2, as one prompt has no standard error",
    "--slack-prompts 1": r"--slack-prompts 1: must be at least 2",
    "--top-p 1.5": r"--top-p 1\.5: must lie in \(0, 1\]\.",
    "--labels hard": r"--labels hard: must be one of soft, sampled, sampled-once, regression, ",
    "--schedule step": r"--schedule step: must be one of constant, linear, cosine\.",
    "--device tpu": r"--device tpu: must be one of auto, cpu, cuda\.",
    "--cost": r"--cost is empty: name at least one cost",
    "--dual-rule bisection --cost "
    "harm harm-audit --threshold 1 1": r"--dual-rule bisection: 2 costs; it takes one",
    "--cost harm harm --threshold 1 1": r"--cost harm harm: two costs have one name",
    "--threshold 0.1 0.2": r"--threshold 0\.1 0\.2: 2 value\(s\) for 1 cost\(s\)",
    "--responses-per-prompt 9": r"--responses-per-prompt 9: must be at least "
    r"2 and at most --n-responses 8; 0 takes all\.",
    "--responses-per-prompt 1": r"--responses-per-prompt 1: must be at least "
    r"2 and at most --n-responses 8; 0 takes all\.",
    "dpo --objective both": r"--objective both: must be one of reward, safety\.",
    "sacpo --lam 1 2": r"--lam 1\.0 2\.0: give one value for each of the 1 cost\(s\)\.",
    "primal_dual --advantage gae": r"--advantage gae: must be one of rloo, group_norm\.",
    "cdpo --lam-init -1": r"--lam-init -1\.0: must lie in \[0, 1e\+09\]\.",
    "--slack-prompts 9999": r"--slack-prompts 9999: slack and pairs need disjoint prompts",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_command_lines_take_one_line_and_exit_2(trained, capsys, line):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match("error: " + BAD[line], err)
    assert err.count("\n") == 1
    assert not trained


@pytest.mark.parametrize(
    "line", ["--lamda-max 3", "cadi", "--steps x", "--steps 0", "--resume some/run --steps 3"]
)
def test_bad_command_lines_import_nothing_heavy(line):
    code, _, err, modules = in_new_process(*line.split())
    assert code == 2
    assert err.count("\n") == 1
    assert not modules & {"torch", "transformers", "numpy"}


def test_every_algorithm_has_a_shown_name_and_readings_are_called_so():
    assert all(ALGORITHMS[name].shown for name in CONFIGS)
    readings = {name for name, row in ALGORITHMS.items() if row.shown.startswith("our reading of ")}
    assert readings == {"repo", "opd", "cdpo", "pd_dpo"}
    for name in readings:
        assert f"{shown_name(name)}: " in ALGORITHMS[name].help
        assert CONFIGS[name].__doc__.startswith("Our reading of ")
    assert shown_name("samples") == "samples"


def test_check_accepts_the_defaults_and_presets():
    for config_class in CONFIGS.values():
        check(config_class())
        check(smoke(config_class()))


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_no_number_may_be_nan(algorithm):
    """Every float of every algorithm is found by its type, so that a field added later is checked too."""
    default = CONFIGS[algorithm]()
    for field in fields(default):
        value = getattr(default, field.name)
        if "float" in str(field.type):
            with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} nan"):
                check(replace(default, **{field.name: (math.nan,) if isinstance(value, tuple) else math.nan}))


def test_algorithm_and_flags_reach_train(trained):
    assert cli.main([]) == 0
    assert (
        cli.main(["--seed", "4", "--cost", "a", "b", "--threshold", "-0.1", "0.2", "--force", "--system", ""])
        == 0
    )
    assert cli.main(["mocan", "--lora_from=0.25", "--system=-x"]) == 0
    assert trained == [
        ("caid", CaidConfig(), {}),
        ("caid", CaidConfig(seed=4, cost=("a", "b"), threshold=(-0.1, 0.2), force=True, system=""), {}),
        ("mocan", MocanConfig(lora_from=0.25, system="-x"), {}),
    ]


def test_flags_win_over_the_preset_even_at_the_default(trained):
    default = CaidConfig()
    assert smoke(default).steps != default.steps
    assert cli.main(["--preset", "smoke"]) == 0
    assert cli.main(["--steps", str(default.steps), "--preset=smoke", "--max-new-tokens", "5"]) == 0
    assert trained[0][1] == smoke(default)
    assert asdict(trained[1][1]) == asdict(smoke(default)) | {"steps": default.steps, "max_new_tokens": 5}


@pytest.mark.parametrize("named", [[], ["mocan"]])
def test_resume_rebuilds_the_config(trained, run_folder, named):
    assert cli.main([*named, "--resume", run_folder]) == 0
    assert trained == [
        ("mocan", MocanConfig(cost=("harm", "other"), threshold=(0.1, 0.2), steps=7), {"resume": run_folder})
    ]


def test_resume_refuses_other_folders(trained, run_folder, tmp_path, capsys):
    from engine.run.run import Run

    Run.create(
        tmp_path / "new", algorithm="mocan", config={"steps": 7, "momentum": 1}, versions={}, fingerprint="f"
    ).close()
    Run.create(tmp_path / "other", algorithm="head", config={}, versions={}, fingerprint="f").close()
    lines = {
        ("caid", "--resume", run_folder): f"--resume {run_folder}: that is a run of mocan, not of caid",
        ("--resume", str(tmp_path / "absent")): f"{tmp_path / 'absent'} does not exist",
        ("--resume", str(tmp_path / "new")): "unknown field 'momentum'",
        ("--resume", str(tmp_path / "other")): "a run of 'head' cannot be resumed",
        ("--resume", ""): "--resume: a value is missing",
    }
    for argv, message in lines.items():
        assert cli.main(list(argv)) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not trained


STOPS = {
    "user": (UserError("--reward x: no such head."), 2, "error: --reward x: no such head.\n"),
    "non-finite": (
        NonFiniteError("loss is nan at step 3; batch saved."),
        3,
        "error: loss is nan at step 3; batch saved.\n",
    ),
    "interrupted": (
        Interrupted("stopped; go on with --resume runs/a"),
        130,
        "stopped; go on with --resume runs/a\n",
    ),
    "killed": (
        KeyboardInterrupt(),
        130,
        "interrupted: go on with python -m engine.train --resume my/run\n",
    ),
    "disk full": (
        NotWritten("disk full while saving a; free space", again=True),
        2,
        "error: disk full while saving a; free space and go on with python -m engine.train --resume my/run\n",
    ),
    "a long name": (
        NotWritten("cannot write a; choose a shorter name", again=False),
        2,
        "error: cannot write a; choose a shorter name.\n",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_exit_codes(trained, capsys, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained.stop, code, line = STOPS[case]
    assert cli.main(["--out", "my/run"]) == code
    # A run that has not begun cannot go on.
    resume = "go on with python -m engine.train --resume my/run"
    assert capsys.readouterr().err == line.replace(resume, "start the command again")
    (tmp_path / "my" / "run").mkdir(parents=True)
    (tmp_path / "my" / "run" / "config.json").write_text("{}")
    assert cli.main(["--out", "my/run"]) == code
    assert capsys.readouterr().err == line


def test_our_own_bugs_keep_their_traceback_and_end_with_how_to_go_on(trained, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    trained.stop = RuntimeError("a bug")
    assert cli.main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-2] == "RuntimeError: a bug"
    assert lines[-1] == (
        "error: RuntimeError is a mistake of this program, not yours: please report the lines above; to try "
        f"once more, go on with python -m engine.train --resume {tmp_path}"
    )


def test_numbers_of_prompts_are_lowered_to_those_that_are_there():
    config, said = fit(CaidConfig(), 60, 15)
    assert (config.n_prompts, config.eval_prompts, config.slack_prompts, config.prompts_per_step) == (
        60,
        15,
        20,
        16,
    )
    assert said == "--n-prompts is 60, --eval-prompts is 15, --slack-prompts is 20"
    check(config)
    config, _ = fit(CaidConfig(), 30, 15)
    assert (config.slack_prompts, config.prompts_per_step) == (10, 16)
    check(config)
    assert fit(CaidConfig(), 10_000, 10_000) == (CaidConfig(), "")
    assert fit(MocanConfig(), 10, 96)[0].prompts_per_step == 10
    assert fit(config, 30, 15) == (config, "")


def test_settings_come_from_a_file_and_flags_win(trained, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# what we run every week\nalgorithm: mocan\ncost: [a, b]\nthreshold: [-1e-1, 0.2]\n"
        "learning-rate: 1e-5\nlora_from: 0.25\nsystem: 'no: 7'\nseed: 010\nforce: true\nprompts:\n"
    )
    assert cli.main(["--config", str(file), "--seed", "4"]) == 0
    settings = {
        "cost": ("a", "b"),
        "threshold": (-0.1, 0.2),
        "learning_rate": 1e-5,
        "lora_from": 0.25,
        "system": "no: 7",
        "force": True,
    }
    assert trained == [("mocan", MocanConfig(**settings, seed=4), {})]
    file.write_text("steps: 7\nmax_new_tokens: 5\nmodel: ''\n")
    assert cli.main([f"--config={file}", "--preset", "smoke", "--max-new-tokens", "6"]) == 0
    assert trained[1][1] == replace(smoke(CaidConfig()), steps=7, max_new_tokens=6, model="")


def test_a_runs_config_is_read_back(trained, run_folder, tmp_path):
    assert cli.main(["--config", f"{run_folder}/config.json", "--out", "again"]) == 0
    written = MocanConfig(cost=("harm", "other"), threshold=(0.1, 0.2), steps=7, out="again")
    assert trained == [("mocan", written, {})]
    from engine.run.run import Run

    endless = CaidConfig(max_kl=math.inf, cost_mean=(math.inf,))
    with Run.create(tmp_path / "b", "caid", asdict(endless), versions={}, fingerprint="f", inputs={}):
        pass
    assert cli.main(["caid", "--config", str(tmp_path / "b" / "config.json")]) == 0
    assert trained[1] == ("caid", endless, {})


@pytest.mark.parametrize(
    "text, said",
    {
        "steps: 7\nsteps: 8\n": "the setting 'steps' stands there twice",
        "steps: 7\nlamda-max: 3\n": "unknown flag --lamda-max. Did you mean --lam-max?",
        "steps: seven\n": "--steps seven: must be a whole number",
        "steps: [7, 8]\n": "--steps 7 8: takes one value",
        "- steps\n": ":1: no mapping from settings to values",
        "steps\n": ":1: no mapping from settings to values",
        "seed: 1\nsteps: {at: 7}\n": ":2: steps holds a mapping where one value is wanted",
        "seed: 1\ncost: [a, [b]]\n": "cost holds a sequence where one value is wanted",
        "cost: [--force]\n": "'--force' begins as a flag does",
        "steps: [7\n": "no YAML",
        "a: *b\n": "no YAML",
        "algorithm: dppo\n": "unknown algorithm 'dppo'. Did you mean dpo?",
        "algorithm: [caid]\n": "unknown algorithm",
        "force: 1\n": "--force 1: takes no value",
    }.items(),
)
def test_files_of_settings_that_cannot_be_used_are_named(trained, tmp_path, capsys, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    assert cli.main(["--config", str(tmp_path / "mine.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not trained
    if "algorithm:" not in text:
        assert str(tmp_path / "mine.yaml") in line


def test_a_file_of_another_algorithm_or_none_is_refused(trained, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("algorithm: mocan\n")
    assert cli.main(["caid", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "its settings are those of mocan, not of caid" in capsys.readouterr().err
    assert cli.main(["--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err and not trained


def test_steps_take_the_place_of_the_epochs_of_a_preset_or_a_file(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_find", lambda *published: None)
    assert cli.main(["mocan", "--preset", "safe-rlhf"]) == 0
    assert cli.main(["mocan", "--preset", "safe-rlhf", "--steps", "25", "--beta", "1"]) == 0
    preset, freed = trained[0][1], trained[1][1]
    assert preset == safe_rlhf(MocanConfig()) and (preset.epochs, preset.beta) == (3, 0.1)
    # Also flags at the default win.
    assert freed == replace(preset, epochs=0, steps=25, beta=1.0)
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: mocan\npairs: p.csv\nepochs: 2\nsteps: 40\n")
    assert cli.main(["--config", str(file)]) == 0
    assert cli.main(["--config", str(file), "--steps", "3"]) == 0
    assert [(c.epochs, c.steps) for _, c, _ in trained[2:]] == [(2, 40), (0, 3)]


def test_epochs_become_steps():
    config = MocanConfig(pairs="p.csv", epochs=3, prompts_per_step=16)
    with_5039, said = with_steps(config, 26_874)
    assert with_5039 == replace(config, steps=5039)  # 3 x 26,874 / 16 = 5,038.9
    assert said == "--epochs 3 of 26874 pairs, 16 a step: 5039 steps in each policy update"
    assert with_steps(MocanConfig(), 26_874) == (MocanConfig(), "")
    with pytest.raises(UserError, match="3000000 steps, more than 1000000; lower --epochs"):
        with_steps(replace(config, prompts_per_step=1), 10**6)


def test_pairs_of_a_file_leave_all_prompts_to_the_slack():
    config = CaidConfig(pairs="p.csv", n_prompts=600, slack_prompts=600, prompts_per_step=35)
    check(config)
    assert fit(config, 10**4, 10**4) == (config, "")
    assert fit(config, 100, 10**4)[0] == replace(config, n_prompts=100, slack_prompts=100)
