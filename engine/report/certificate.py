"""certificate.json and certificate.html: what a verdict says, how it was found, and on what it rests.

The page is drawn from what certificate.json holds and from nothing else. Equal runs write equal certificates:
no time and no place of this machine is in them, beyond what the user's own settings name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path, PurePath

from engine.config import shown_name
from engine.constraints import Judged, Rate
from engine.errors import UserError
from engine.files import read_json, shown, write_json, write_whole
from engine.intervals import number
from engine.records import UNIT_NAMES, Prompts
from engine.report.html import document, table, verdict_box
from engine.report.model_card import command_line
from engine.run.contents import Contents
from engine.run.folder import RunFolder
from engine.run.rows import plain
from engine.run.shards import Stored
from engine.run.store import dumps, sha256_of
from engine.verdict.evaluation import Evaluation
from engine.verdict.refusals import OverRefusal
from engine.verdict.sentences import sentences

VERSION = 1
STYLE = (
    "pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .6rem; }"
    "td:first-child { text-align: left; } .digest td { text-align: left; font-family: monospace; }"
)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was judged, and what it was made from."""

    contents: Contents  # of the run
    iterate: int  # 0: the reference
    weights: str  # `weights_digest` of the iterate; "" for the reference
    train: Prompts  # all prompts that the run trained on, or chose from
    sources: Mapping[str, Mapping[str, str]]  # flag -> file -> SHA-256 of what was read
    model: Mapping[str, str]  # file of the base model -> SHA-256
    scorers: Mapping[str, Mapping[str, str]]  # as `engine.scorers.find.content` gives them
    changed_scorers: Mapping[str, str]  # by name, SHA-256 of one that --accept-changes let pass on the way


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How it was judged."""

    evaluation: Evaluation
    prompts: Prompts  # that were answered
    seed: int  # of the responses
    earlier: int  # verdicts before this one on this policy, or on some of these prompts
    over_refusal: OverRefusal | None = None  # where it was measured
    shared: str = ""  # says which of the prompts were trained on too
    chosen_on: int = 0  # other held-out prompts on which the iterate was chosen among all


def certificate(made: Made, judging: Judging) -> dict:
    """Returns what certificate.json holds: JSON without numbers that are not finite.

    Its key "sha256" is the SHA-256 of all other keys, as `engine.run.store.dumps` writes them.
    """
    e, config = judging.evaluation, made.contents.config
    found = {
        "version": VERSION,
        "word": e.word,
        "statement": sentences(e),
        "covers": covers(e, judging.earlier),
        "assumptions": assumptions(made, judging),
        "confidence": e.confidence,
        "constraints": [_constraint(c, e.units) for c in e.constraints],
        "looks": [{**asdict(look), "error": (1 - e.confidence) * look.share} for look in e.looks],
        "earlier_verdicts": judging.earlier,
        "units": e.units,
        "reward": asdict(e.reward),
        "audits": [{"name": name, **asdict(improvement)} for name, improvement in e.audits],
        "kl": asdict(e.kl),
        "kl_is_log_ratio": e.truncated,
        "finished": e.finished,
        "mean_length": e.mean_length,
        "refusals": {
            "told_by": e.refusals_by,
            "harmless_prompts": e.refusal_harmless,
            "look_alikes": None if judging.over_refusal is None else asdict(judging.over_refusal),
        },
        "sampling": {
            **{name: config.get(name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
            "prompts": e.n_prompts,
            "responses": e.n_responses,
            "seed": judging.seed,
        },
        "digests": {
            "policy": made.weights,
            "held-out prompts": prompts_digest(judging.prompts),
            "training prompts": prompts_digest(made.train),
            "files": {
                # Files in folders may have one name.
                flag: sorted([PurePath(file).name, digest] for file, digest in files.items())
                for flag, files in made.sources.items()
            },
            "model": {"fingerprint": made.contents.fingerprint, "files": dict(made.model)},
            "scorers": {name: _scorer(name, made) for name in made.scorers},
        },
        "run": {
            "algorithm": made.contents.algorithm,
            "model": PurePath(config.get("model") or "").name,
            "iterate": made.iterate,
            "versions": made.contents.versions,
            "command": command_line(made.contents.algorithm, config),
        },
    }
    text = dumps(plain(found))
    # The order of the keys is that of the file, in which the page shows them.
    return {**json.loads(text), "sha256": sha256_of({}, text)}


def covers(e: Evaluation, earlier: int) -> str:
    """Says what the confidence covers, and what it does not."""
    J, error = len(e.constraints), f"at most {100 * (1 - e.confidence):.3g} %"
    if not all(c.exact for c in e.constraints):
        error = f"{error}, as far as approximate bounds hold,"
    several = f"all {J} constraints" if J > 1 else "the constraint"
    verdicts = "verdict" if earlier == 1 else "verdicts"
    counted = f", the {earlier} {verdicts} before it" if earlier else ""
    text = (
        f'That {several} should be called "met" although not so has a probability of {error} over '
        f"all looks of this verdict{counted} and all later ones that the run folder knows of: each spends a "
        "share of that error, fixed beforehand."
    )
    if J > 1:
        text += (
            " The word for all together needs each constraint's own bound; the words and bounds of single "
            "constraints are corrected for their number, so that they hold together."
        )
    return text + (
        f" The two-sided intervals have {100 * e.confidence:g} % each, as if there were one look and one "
        "number; so have those of reward and audits."
    )


def assumptions(made: Made, judging: Judging) -> list[str]:
    """Lists what the verdict leans on, in sentences."""
    e, config = judging.evaluation, made.contents.config
    said = [
        "The held-out prompts are a random sample of those that the policy will meet: nothing is said of "
        "prompts of another kind.",
        "Neither the policy nor a setting was chosen by what these prompts showed, beyond the looks and "
        "verdicts counted here.",
        "The scorers are the judge: a policy can please them without being better, and audits, which nobody "
        "optimised, only hint at that.",
        "Responses are drawn as the sampling settings say; other settings are another policy.",
    ]
    if rough := [c.name for c in e.constraints if not c.exact]:
        said.append(
            f"Bounds of {', '.join(rough)} are approximate, as these costs have no known range: they allow "
            "for the spread and the skewness of the responses that were seen, and not for rare harm unlike "
            "all of them."
        )
    for c in e.constraints:
        if c.exact and c.limit.costs_within is not None and not isinstance(c.limit, Rate):
            least, most = c.limit.costs_within
            said.append(f"No response can cost less than {least:g} or more than {most:g} by {c.name}.")
    for c in e.constraints:
        if c.limit.on:
            said.append(f"{c.name} is about prompts marked {c.limit.on}, as the data mark them.")
    if judging.shared:
        said.append(f"{judging.shared}: on these the policy may be better than on new ones.")
    if judging.chosen_on:
        said.append(
            f"The iterate was chosen among all of the run on {judging.chosen_on} other held-out prompts; "
            "those judged here took no part in it."
        )
    for name, scorer in made.scorers.items():
        if scorer["form"] == "judge":
            said.append(
                f"{name} is a judge behind HTTP: its digest is of its address and form, and what answers "
                "there stays the same."
            )
    if made.changed_scorers:
        said.append(
            f"{', '.join(sorted(made.changed_scorers))} changed on the way (--accept-changes): some scores "
            "may be those of the original."
        )
    if config.get("force"):
        said.append("--force: the run went on with thresholds beyond what its samples support.")
    return said


def weights_digest(tensors: Mapping) -> str:
    """Returns the SHA-256 of an iterate's tensors, in the order of their names.

    Each one's name, dtype and shape stand before its numbers, as `engine.run.store.sha256_of` hashes them.
    """
    here = {
        name: value if isinstance(value, Stored) else value.detach().cpu().contiguous()
        for name, value in tensors.items()
    }
    return sha256_of(here, "")


def prompts_digest(prompts: Prompts) -> str:
    """Returns the SHA-256 of prompts, whatever their order.

    It is that of the sorted lines [text, kind, token ids] in JSON, one for each prompt.
    """
    rows = zip(prompts.text, prompts.kind, prompts.token_ids, strict=True)
    lines = sorted(dumps([text, kind, list(ids)]) for text, kind, ids in rows)
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def write(folder: Path, found: dict) -> list[Path]:
    """Writes certificate.json and certificate.html into a folder; returns their paths. Raises: UserError."""
    paths = RunFolder(folder)
    write_json(paths.certificate, found)
    write_whole(paths.certificate_html, page(found).encode("utf-8", "replace"))
    return [paths.certificate, paths.certificate_html]


def read(path: Path, *, cure: str) -> dict:
    """Reads certificate.json. `cure` ends the error message.

    Raises: UserError where it cannot be read, or is not as it was written.
    """
    found = read_json(path, cure=cure)
    rest = plain({key: value for key, value in found.items() if key != "sha256"})
    if sha256_of({}, dumps(rest)) != found.get("sha256"):
        raise UserError(f"{shown(path)} is not as it was written; {cure}.")
    if found["version"] != VERSION:
        raise UserError(f"{shown(path)} is of another version of this program; {cure}.")
    return found


def page(found: dict) -> str:
    """Returns the HTML page of a certificate, in which every text is escaped."""
    run = found["run"]
    title = escape(f"Certificate: {shown_name(run['algorithm'])} on {run['model'] or 'the default model'}")
    resting = "".join(f"<li>{escape(line)}</li>" for line in found["assumptions"])
    body = f"""<h1>{title}</h1>
{verdict_box(found["word"], found["statement"])}
<h2>What the confidence covers</h2>
<p>{escape(found["covers"])}</p>
<h2>What it rests on</h2>
<ul>{resting}</ul>
<h2>Constraints</h2>
{_constraint_table(found)}
<h2>Looks</h2>
{_look_table(found)}
<p>Earlier verdicts on this policy or on some of these prompts: {found["earlier_verdicts"]}.</p>
<h2>Beside the constraints</h2>
{_other_table(found)}
<h2>How responses were drawn</h2>
{table(["setting", "value"], [[name, str(value)] for name, value in found["sampling"].items()], "settings")}
<h2>Digests (SHA-256)</h2>
{table(["of", "digest"], _digests(found), "digest")}
<h2>How to make it again</h2>
<pre>{escape(run["command"])}</pre>
<p>Iterate {run["iterate"]} of the run. Commit {escape(run["versions"].get("commit", "unknown"))}; \
{escape(_packages(run["versions"]))}.</p>"""
    return document(title, body, STYLE)


def _constraint(c: Judged, units: str) -> dict:
    limit, judged = c.limit, c.judged
    unit = UNIT_NAMES[units]
    if limit.at_most:
        unit = "share of responses" if limit.percent else "the scorer's own units"
    return {
        "name": limit.name,
        "kind": limit.kind,
        "asked": limit.asked_text(),
        "at_most": limit.at_most,
        "value": limit.value,
        "on": limit.on,
        "counted": None if limit.counted is None else asdict(limit.counted),
        "costs_within": limit.costs_within,
        "unit": unit,
        **asdict(judged),
        "reference": c.reference,
        "improvement": None if c.measured is None else asdict(c.estimate),
        "word": c.word,
        "holds": c.holds,
        "bounds": "exact" if c.exact else "approximate",
        "no_word_since": c.silent_for,
    }


def _scorer(name: str, made: Made) -> dict:
    scorer = {key: made.scorers[name][key] for key in ("form", "sha256")}
    changed = made.changed_scorers.get(name)
    return scorer if changed is None else {**scorer, "changed_to": changed}


def _constraint_table(found: dict) -> str:
    head = ["constraint", "asked for", "on", "mean", "two-sided", "one-sided", "bounds", "prompts", "word"]
    rows = [
        [
            c["name"], c["asked"], c["on"] or "all prompts", number(c["mean"], 3),
            _interval(c["low"], c["high"]), _interval(c["lower"], c["upper"]), c["bounds"], str(c["n"]),
            c["word"],
        ]
        for c in found["constraints"]
    ]  # fmt: skip
    units = "; ".join(f"{c['name']} in {c['unit']}" for c in found["constraints"])
    return table(head, rows) + f'<p class="small">Means and bounds of {escape(units)}.</p>'


def _look_table(found: dict) -> str:
    names = [c["name"] for c in found["constraints"]]
    head = ["look", "prompts x responses", "error of a bound"]
    head += [f"{name}: {what}" for name in names for what in ("mean", "bounds", "word")]
    rows = []
    for i, look in enumerate(found["looks"], 1):
        row = [f"{i} of at most {look['planned']}", f"{look['prompts']} x {look['responses']}"]
        row.append(f"{100 * look['error']:.3g} %")
        for mean, bounds, word in zip(look["means"], look["bounds"], look["words"], strict=True):
            row += [number(mean, 3), _interval(*bounds), word]
        rows.append(row)
    return table(head, rows)


def _other_table(found: dict) -> str:
    def estimated(name: str, e: Mapping, unit: str, scale: float = 1) -> list[str]:
        # Where no prompt's number differs, the interval has no width and says nothing.
        equal = e.get("se") == 0
        interval = "all prompts equal" if equal else _interval(scale * e["low"], scale * e["high"])
        return [name, number(scale * e["mean"], 3), interval, unit]

    units = UNIT_NAMES[found["units"]]
    rows = [estimated("reward: improvement", found["reward"], units)]
    rows += [
        estimated(f"audit {a['name']} (never optimised): improvement", a, units) for a in found["audits"]
    ]
    kl = "mean log-ratio, no KL" if found["kl_is_log_ratio"] else "KL(policy || reference)"
    rows.append(estimated(kl, found["kl"], "nats per response"))
    before, after = found["finished"]
    rows.append(["finished answers", f"{100 * before:.1f} -> {100 * after:.1f}", "", "%"])
    before, after = found["mean_length"]
    rows.append(["mean length", f"{before:.1f} -> {after:.1f}", "", "tokens"])
    refusals = found["refusals"]
    if refusals["harmless_prompts"] is not None:
        before, after = refusals["harmless_prompts"]
        rows.append(["refusals on harmless prompts", f"{100 * before:.1f} -> {100 * after:.1f}", "", "%"])
    if alike := refusals["look_alikes"]:
        for side in ("reference", "policy"):
            rows.append(estimated(f"refusals on harmless look-alikes, {side}", alike[side], "%", 100))
        rows.append(estimated("refusals on harmless look-alikes, change", alike["change"], "points", 100))
    return table(["measure", "value", f"{100 * found['confidence']:g} % interval", "unit"], rows)


def _digests(found: dict) -> list[list[str]]:
    digests = found["digests"]
    rows = [
        ["trained weights", digests["policy"] or "none: the reference was judged"],
        ["held-out prompts", digests["held-out prompts"]],
        ["training prompts", digests["training prompts"]],
    ]
    rows += [[f"{flag} {name}", d] for flag, files in digests["files"].items() for name, d in files]
    rows.append(["base model (fingerprint)", digests["model"]["fingerprint"]])
    rows += [[f"base model: {name}", digest] for name, digest in digests["model"]["files"].items()]
    for name, scorer in digests["scorers"].items():
        rows.append([f"scorer {name} ({scorer['form']})", scorer["sha256"]])
        if "changed_to" in scorer:
            rows.append([f"scorer {name}, changed on the way", scorer["changed_to"]])
    return [*rows, ["this certificate", found["sha256"]]]


def _packages(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(versions.items()) if name != "commit")


def _interval(low: float | None, high: float | None) -> str:
    return f"[{', '.join('-' if x is None else number(x, 3) for x in (low, high))}]"
