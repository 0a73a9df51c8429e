"""report.png and report.html of a run folder.

They are a pure function of the files in it: equal files give equal bytes. The page names what a stopped run
has not written as missing. Rewards and utilities in the files are in the run's --units. The page loads
nothing from elsewhere.
"""

import base64
from html import escape
from pathlib import Path

from engine.files import write_whole
from engine.report.html import SAMPLES_NOTE, cell, document, item, table, verdict_box, with_se
from engine.report.panels import picture
from engine.report.run_files import RunFiles, read
from engine.verdict.sentences import sentences

ONE_UNIT = {
    "deviation": "One unit of reward, of a utility and of an audit is that score's standard deviation within "
    "one prompt among the reference's responses.",
    "raw": "Rewards, utilities and audits are in the scorers' own units.",
}


def write(folder: Path) -> list[Path]:
    """Writes report.png and report.html into the run folder, each whole or not at all; returns their paths.

    Raises: UserError when the folder has none of a run's files, one of them cannot be read as JSON,
    or the two cannot be written.
    """
    folder = Path(folder)
    run = read(folder)
    image = picture(run)
    page = _page(run, image).encode("utf-8", "replace")
    paths = [folder / "report.png", folder / "report.html"]
    for path, content in zip(paths, (image, page), strict=True):
        write_whole(path, content)
    return paths


def _page(run: RunFiles, picture: bytes) -> str:
    """Returns the HTML page, in which every text from a file is escaped."""
    title = escape(run.title)
    body = f"""<h1>{title}</h1>
{_verdict(run)}
<h2>Pictures</h2>
<p><img alt="Multipliers, constraints, trade-off, score histograms, training loss and looks of this run"
src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>
<h2>Iterations</h2>
{_iteration_table(run)}
<h2>Before and after</h2>
{_samples(run)}
<h2>Settings</h2>
{_settings(run)}
<h2>What the numbers mean</h2>
{_note(run)}"""
    return document(title, body)


def _verdict(run: RunFiles) -> str:
    if run.evaluation is None:
        text = "No verdict: this run has no held-out evaluation yet (evaluation.json is missing)."
        return f'<div class="verdict none"><p>{text}</p></div>'
    return verdict_box(run.evaluation.word, sentences(run.evaluation))


def _iteration_table(run: RunFiles) -> str:
    if not run.iteration:
        return "<p>No iteration was finished.</p>"
    head = ["iteration", "reward"]
    for name in run.names:
        head += [f"{name}: {what}" for what in ("lambda", "improvement", "b", "aimed at", "slack")]
    settings = run.config.get("config", {})
    truncated = settings.get("top_p", 1) < 1 or settings.get("top_k", 0) > 0
    head += ["log-ratio (nats)" if truncated else "KL (nats)", "KL of the tilt aimed at", "loss"]
    tilt = {row.get("iteration"): row.get("tilt_kl") for row in run.policy}
    body = []
    for i, row in enumerate(run.iteration):
        cells = [str(row.get("iteration", i)), with_se(row.get("reward"), row.get("reward_se"))]
        for j in range(len(run.names)):
            value = {
                key: item(row, key, j)
                for key in "lam improvement improvement_se threshold aim slack slack_se".split()
            }
            cells += [
                cell(value["lam"], 3),
                with_se(value["improvement"], value["improvement_se"]),
                cell(value["threshold"]),
                cell(value["aim"]),
                with_se(value["slack"], value["slack_se"]),
            ]
        kl = with_se(row.get("kl"), row.get("kl_se"))
        body.append([*cells, kl, cell(tilt.get(row.get("iteration"))), cell(row.get("loss"), 4)])
    return table(head, body)


def _samples(run: RunFiles) -> str:
    """Shows the first response to the first 10 delicate and the first 6 other prompts of the file."""
    first = [row for row in run.heldout if row.get("sample", 0) == 0]
    delicate = [row for row in first if row.get("kind") == "delicate"][:10]
    rows = delicate + [row for row in first if row.get("kind") != "delicate"][: 6 if delicate else 16]
    if not rows:
        return "<p>No held-out responses were written (heldout.jsonl is missing or empty).</p>"
    return SAMPLES_NOTE + "".join(_sample(run, row) for row in rows)


def _sample(run: RunFiles, row: dict) -> str:
    sides = []
    for side, name in (("reference", "Before"), ("policy", "After")):
        scores = [f"reward {cell(row.get(f'{side}_reward'))}"]
        scores += [
            f"utility {constraint} {cell(item(row, f'{side}_utility', j))}"
            for j, constraint in enumerate(run.names)
        ]
        judged_audits = [name for name, _ in run.evaluation.audits] if run.evaluation else []
        audits = run.reference.get("audit_names") or judged_audits
        scores += [f"utility {audit} {cell(item(row, f'{side}_audit', a))}" for a, audit in enumerate(audits)]
        cut = "" if row.get(f"{side}_finished", True) else " (cut off at the length limit)"
        sides.append(
            f'<div><div class="small">{name}: {escape(", ".join(scores))}</div>'
            f'<div class="text" dir="auto">{escape(str(row.get(side, "")))}'
            f'<span class="small">{cut}</span></div></div>'
        )
    kind = f'<div class="small">{escape(str(row["kind"]))}</div>' if row.get("kind") else ""
    prompt = f'<div class="text prompt" dir="auto">{escape(str(row.get("prompt", "")))}</div>'
    return f'<div class="sample">{kind}{prompt}<div class="sides">{"".join(sides)}</div></div>\n'


def _settings(run: RunFiles) -> str:
    """Shows the configuration without `out`: where a run was written does not change what it is."""
    config = {name: value for name, value in run.config.get("config", {}).items() if name != "out"}
    if not config:
        return "<p>The settings are not known (config.json is missing).</p>"
    shown = [
        [name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for name, value in config.items()
    ]
    return table(["setting", "value"], shown, "settings")


def _note(run: RunFiles) -> str:
    """Explains the numbers, and gives the reference's."""
    lines = [
        f"{ONE_UNIT[run.units]} A utility is a cost with its sign changed, so larger is "
        "better everywhere. All improvements are over the reference.",
        "b is the required improvement. The dual may aim higher, so that the held-out test can confirm b. "
        "The slack is the measured improvement minus the aimed value. The multiplier lambda is the price of "
        "the constraint in units of reward.",
        "Met: the one-sided bound of a constraint confirms it. Not met: the other bound refutes it. Not "
        "resolved: neither; more prompts would tell. Each look spends a share of the error that all of them "
        "may have, fixed beforehand, so that one may look again. Intervals and bounds are over prompts: they "
        "hold for new prompts of the same kind. They are exact where costs have a known range, and else "
        "Student's with a correction for skewness, which is approximate. The certificate beside this page "
        "says on what the verdict rests.",
        "Constraints and reward are judged by the scorers that training used, and a policy can exploit a "
        "scorer. Audits are scorers that training never used.",
    ]
    facts = {
        "reward sd": cell(run.reference.get("reward_sd"), 4),
        "utility sd": ", ".join(cell(x, 4) for x in run.reference.get("utility_sd") or []),
        "correlation of reward and utility": ", ".join(
            cell(x) for x in run.reference.get("correlation") or []
        ),
        "finished": cell(run.reference.get("finished"), 3),
    }
    known = [f"{name} {value}" for name, value in facts.items() if value not in ("", "-")]
    if known:
        lines.append(f"The reference on the training prompts, in the scorers' own units: {'; '.join(known)}.")
    for row in run.dual:
        if row.get("lam"):
            parts = [f"lambda {', '.join(cell(x, 3) for x in row['lam'])}"]
            if predicted := row.get("predicted_improvement"):
                parts.append(f"predicted improvement {', '.join(map(cell, predicted))}")
            if (ess := row.get("ess")) is not None:
                of = f" of {n}" if (n := run.reference.get("responses")) else ""
                parts.append(f"effective sample size {cell(ess, 1)}{of}")
            lines.append(f"Warm start of the dual: {', '.join(parts)}.")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
