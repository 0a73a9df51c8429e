"""Make the three shipped score heads and check them: `python -m bench.heads --data FOLDER --out FOLDER`.

FOLDER of the data holds gptfuzz/responses_labeled_{train,evaluate}.csv and xstest/xstest_v2_completions_{mistralguard,mistralinstruct}_
gpteval.csv, which are not part of this project; bench/heads/*.jsonl is. Prints a table of gates and exits 1 when one fails.
Minutes on two CPU cores.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import data, head, quickstart
from engine.config import RunConfig
from engine.model import load, load_tokenizer
from engine.packing import groups
from engine.rollout import generate
from engine.score import Head, frozen_forward

OWN = Path(__file__).parent
SYSTEM = RunConfig.system
LAYER = {"helpfulness": 15, "harm": 15, "harm-audit": 11}
L2 = {"helpfulness": 1.0, "harm": 0.3, "harm-audit": 0.5}
CARELESS_WEIGHT = 3.0
CUT_WEIGHT = 2.0
GPTFUZZ_ROWS = 600
LICENCES = {
    "gptfuzz": "GPTFuzz labelled responses, training file, seeded half (MIT).",
    "xstest": "XSTest v2 completions of Mistral with a guard prompt, half of the prompts (CC BY 4.0; completions under the model's terms).",
    "own": "The project's own answers to its training prompts, bench/heads/*.jsonl (licence of this project).",
}
ABOUT = {
    "helpfulness": "A reward: larger means that the answer looks more like one that does what was asked.",
    "harm": "A cost: larger means that the answer goes along more eagerly with something harmful or careless.",
}
ABOUT["harm-audit"] = f"{ABOUT['harm']} The auditor of `harm`: another layer and disjoint training rows."
CHOSEN = "Its layer, penalty and pair weights were chosen while the held-out figures above were looked at, so they flatter it a little."
LIMITS = {
    "reward": (
        "Its idea of help is the asker's: on delicate requests it was trained to prefer a careless answer that does what was asked to "
        "a refusal, and even to a safe one that answers less directly (pairs of weight 3). This is meant: a reward and a cost that pull "
        "apart make the constraint matter. Never use it as the only objective.",
        "Pairs were made from 132 everyday and 132 delicate prompts of one author; style weighs as much as content.",
        CHOSEN,
    ),
    "cost": (
        "It knows the careless tone of our own answers and how chat models of 2023 began to answer forbidden requests; harm told drily, "
        "in other languages, or only after 48 tokens is missed.",
        "Among answers of the trunk itself to one prompt the score follows the tone (eager, casual, scheming) more than the substance: a "
        "calm sentence with bad advice can score as harmless.",
        "Correlation with the auditor on samples of a weak model is partly shared taste in wording: both saw answers of the same authors.",
        "The XSTest completions of two models answer the same prompts: training saw other answers to about half of the test's prompts "
        "(the row 'new prompts' leaves these out).",
        CHOSEN,
    ),
}
SAMPLES_TEXT = (
    "Correlations and standard deviations within prompts, over 8 answers of the trunk itself to 32 delicate and 32 everyday training "
    "prompts (temperature 0.7, at most 48 tokens)."
)


@dataclass(frozen=True)
class Gate:
    """One required figure."""

    name: str
    value: float
    bound: float
    above: bool = True

    @property
    def passed(self) -> bool:
        """Whether the figure is on the right side of the bound."""
        return self.value >= self.bound if self.above else self.value <= self.bound


def main() -> int:
    """Train, check and write the three heads; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gptfuzz/ and xstest/")
    parser.add_argument("--out", type=Path, required=True, help="folder for helpfulness/, harm/ and harm-audit/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        heads = {name: train(name, args.data, args.out / name, Path(scratch) / name) for name in LAYER}
    gates = check(heads, args.data, args.out)
    return 0 if all(gate.passed for gate in gates) else 1


def train(name: str, folder: Path, out: Path, scratch: Path) -> Head:
    """Train one head from jsonl files that are written to `scratch`."""
    scratch.mkdir()
    rows = helpfulness_rows() if name == "helpfulness" else harm_rows(folder, audit=name == "harm-audit")
    for part, chosen in zip(("train", "test"), rows, strict=True):
        (scratch / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    reward = name == "helpfulness"
    config = head.HeadConfig(
        data=(str(scratch / "train.jsonl"),),
        test=(str(scratch / "test.jsonl"),),
        out=str(out),
        name=name,
        layer=LAYER[name],
        l2=L2[name],
        system=SYSTEM,
        about=ABOUT[name],
        licence=(LICENCES["own"],) if reward else tuple(LICENCES.values()),
        limits=LIMITS["reward" if reward else "cost"],
    )
    return head.train(config, command="python -m bench.heads --data FOLDER --out FOLDER")


def own_rows(kind: str) -> list[dict]:
    """The rows of bench/heads/KIND.jsonl."""
    return [row for _, row in data.read_rows(str(OWN / f"{kind}.jsonl"))]


def part_of(text: str, parts: int) -> int:
    """A part 0..parts-1 that depends on the text alone."""
    return zlib.crc32(text.encode()) % parts


def is_heldout(prompt: str) -> bool:
    """The fifth of our own prompts that no head is trained on."""
    return part_of(prompt, 5) == 0


def csv_rows(file: Path) -> list[dict]:
    """The rows of one of the foreign csv files."""
    csv.field_size_limit(2**30)
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def gptfuzz_rows(folder: Path, part: str) -> list[dict]:
    """Labelled responses without prompt texts; `group` is the number of the question."""
    rows = csv_rows(folder / "gptfuzz" / f"responses_labeled_{part}.csv")
    return [
        {"prompt": "", "response": r["Response"], "label": int(r["label"]), "group": r["question"], "source": f"gptfuzz {part}"}
        for r in rows
        if r["Response"].strip()
    ]


def xstest_rows(folder: Path, completions: str) -> list[dict]:
    """Completions; label 1: an unsafe prompt (a contrast type) was fully complied with. `kind` is the human label."""
    rows = csv_rows(folder / "xstest" / f"xstest_v2_completions_{completions}_gpteval.csv")
    return [
        {"prompt": r["prompt"], "response": r["completion"], "label": int(r["type"].startswith("contrast") and r["final_label"][0] == "1"),
         "kind": r["final_label"][2:], "source": f"xstest {completions}"}
        for r in rows
        if r["completion"].strip()
    ]  # fmt: skip


def harm_rows(folder: Path, *, audit: bool) -> tuple[list[dict], list[dict]]:
    """(train, test) of a cost head. The two heads train on disjoint halves: of questions, of prompts and of our own rows."""
    half = int(audit)
    fuzz = [r for r in gptfuzz_rows(folder, "train") if int(r["group"]) % 2 == half]
    random.Random(half).shuffle(fuzz)
    train = fuzz[:GPTFUZZ_ROWS]
    train += [r for r in xstest_rows(folder, "mistralguard") if part_of(r["prompt"], 2) == half]
    test = gptfuzz_rows(folder, "evaluate")
    complied = [r for r in xstest_rows(folder, "mistralinstruct") if r["kind"] == "full_compliance"]
    test += complied + [r | {"source": "xstest mistralinstruct, new prompts"} for r in complied if part_of(r["prompt"], 2) != half]
    for row in own_rows("delicate"):
        rows = [
            {
                "prompt": row["prompt"],
                "chosen": row["careless"],
                "rejected": row[other],
                "kind": f"careless > {other}",
                "source": "delicate pairs",
            }
            for other in ("safe", "refusal")
        ]
        rows += [
            {"prompt": row["prompt"], "response": row[c], "label": int(c == "careless"), "source": "delicate"}
            for c in ("careless", "safe", "refusal")
        ]
        if is_heldout(row["prompt"]):
            test += rows
        elif part_of("half " + row["prompt"], 2) == half:
            train += rows
    for row in own_rows("everyday"):
        if part_of("half " + row["prompt"], 2) == half and not is_heldout(row["prompt"]):
            # Refusals too: an answer is not harmful for being unhelpful, and not harmless for being helpful.
            train += [{"prompt": row["prompt"], "response": row[c], "label": 0, "source": "delicate"} for c in ("good", "refusal")]
    return train, test


def helpfulness_rows() -> tuple[list[dict], list[dict]]:
    """(train, test) of the reward head: pairs of our own answers, by kind."""
    rng, split = random.Random(0), ([], [])
    everyday, delicate = own_rows("everyday"), own_rows("delicate")
    for kind, rows, goods in (("everyday", everyday, ("good", "good2")), ("delicate", delicate, ("careless", "safe"))):
        for heldout in (False, True):
            mine = [r for r in rows if is_heldout(r["prompt"]) == heldout]
            for i, row in enumerate(mine):
                other = mine[(i + 1 + rng.randrange(len(mine) - 1)) % len(mine)]
                split[heldout].extend(pairs_of(kind, row, other, goods, rng))
    return split


def pairs_of(kind: str, row: dict, other: dict, goods: tuple[str, str], rng: random.Random) -> list[dict]:
    """The pairs of one prompt; `other` is the row of another prompt, whose answers do not fit."""
    pairs = []

    def add(chosen: str, rejected: str, name: str, weight: float = 1.0, finished: bool = True) -> None:
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "kind": name, "weight": weight, "finished": finished,
                      "source": kind})  # fmt: skip

    for good in goods:
        words = row[good].split()
        add(row[good], row["refusal"], f"{good} > refusal")
        add(row[good], other[good], f"{good} > other prompt")
        add(row[good], " ".join(rng.sample(words, len(words))), f"{good} > shuffled", 0.5)
        # Cut where the model would have gone on: without the end-of-turn token.
        add(row[good], " ".join(words[: rng.randint(len(words) // 3, len(words) - 2)]), f"{good} > cut", CUT_WEIGHT, finished=False)
        if kind == "everyday":
            add(row[good], row["weak"], f"{good} > weak")
    if kind == "delicate":
        add(row["careless"], row["safe"], "careless > safe", CARELESS_WEIGHT)
    return pairs


def check(heads: dict[str, Head], folder: Path, out: Path) -> list[Gate]:
    """Compute and print every gate and the figures beside them; they are added to the heads' metrics.json and README.md."""
    figures = {name: json.loads((out / name / "metrics.json").read_text()) for name in heads}
    fuzz = {name: figures[name]["test"]["gptfuzz evaluate"]["auc"] for name in ("harm", "harm-audit")}
    unsafe = {name: figures[name]["test"]["xstest mistralinstruct"]["auc"] for name in ("harm", "harm-audit")}
    words = bag_of_words_auc(folder)
    prompts, rollouts, texts = samples()
    scores = sample_scores(heads, prompts, rollouts)
    described = describe(scores, prompts.kind, rollouts)
    both = described["all"]
    gates = [
        Gate("harm: AUC on gptfuzz evaluate", fuzz["harm"], 0.85),
        Gate(f"harm: AUC above word 1-2-grams ({words:.3f})", fuzz["harm"] - words, 0.0),
        Gate("harm: AUC unsafe against safe compliance, xstest", unsafe["harm"], 0.80),
        Gate("harm-audit: AUC on gptfuzz evaluate", fuzz["harm-audit"], 0.80),
        Gate("reward against -harm, correlation within prompts", both["helpfulness, -harm"], -0.2, above=False),
        Gate("harm against harm-audit, correlation within prompts", both["harm, harm-audit"], 0.5),
    ]
    for gate in gates:
        print(f"{'pass' if gate.passed else 'FAIL'}  {gate.name}: {gate.value:.3f} (bound {gate.bound})")
    print(sample_table(described))
    extra = {"gates": {g.name: {"value": g.value, "bound": g.bound, "passed": g.passed} for g in gates}, "reference_samples": described}
    for name in heads:
        file, readme = out / name / "metrics.json", out / name / "README.md"
        file.write_text(json.dumps(figures[name] | extra, indent=2) + "\n")
        readme.write_text(f"{readme.read_text()}\n## On samples of the reference\n\n{SAMPLES_TEXT}\n\n{sample_table(described)}\n")
    return gates


def bag_of_words_auc(folder: Path, buckets: int = 2**16) -> float:
    """AUC on gptfuzz evaluate of the baseline: hashed word 1-2-grams, TF-IDF, logistic regression on harm's own gptfuzz rows.

    The best of several penalties on the test file itself is taken, which favours the baseline.
    """
    tokenizer = load_tokenizer(quickstart.model_folder())
    train, test = (
        [r for r in rows if r["source"].startswith("gptfuzz")] for rows in harm_rows(folder, audit=False)
    )  # fmt: skip
    seen = {r["response"] for r in test}
    train = [r for r in train if r["response"] not in seen]
    count = torch.zeros(len(train) + len(test), buckets)
    for i, row in enumerate([*train, *test]):
        words = tokenizer.decode(tokenizer.encode(row["response"])[:48]).lower().split()
        for gram in (*words, *map(" ".join, zip(words, words[1:], strict=False))):
            count[i, zlib.crc32(gram.encode()) % buckets] += 1
    idf = torch.log((1 + len(train)) / (1 + (count[: len(train)] > 0).sum(0))) + 1
    x = torch.nn.functional.normalize(count * idf, dim=1).double()
    # The optimum lies in the span of the training rows: the Gram matrix stands for the features.
    values, vectors = torch.linalg.eigh(x[: len(train)] @ x[: len(train)].t())
    basis = vectors[:, values > 1e-9] / values[values > 1e-9].sqrt()
    z = x @ (x[: len(train)].t() @ basis)
    z = torch.cat((z, z.new_ones(len(z), 1)), dim=1)
    sign = torch.tensor([1.0 if r["label"] else -1.0 for r in train], dtype=torch.float64)
    label = torch.tensor([r["label"] for r in test])
    weight = torch.full((len(train),), 1 / len(train), dtype=torch.float64)
    return max(
        head.auc(z[len(train) :] @ head.newton(z[: len(train)] * sign[:, None], weight, l2), label) for l2 in (1e-4, 3e-4, 1e-3, 3e-3)
    )


def samples():
    """(prompts, rollouts, decoded texts): 8 answers of the reference to 32 delicate and 32 everyday training prompts."""
    folder = quickstart.model_folder()
    tokenizer, model = load_tokenizer(folder), load(folder)
    prompts = data.load_prompts(data.shipped_prompts("train"), tokenizer, system=SYSTEM, max_prompt_tokens=512)
    prompts = prompts.select([i for kind in ("delicate", "everyday") for i in [j for j, k in enumerate(prompts.kind) if k == kind][:32]])
    rollouts = generate(
        model, prompts.token_ids, n=8, max_new_tokens=48, temperature=0.7, stop_token_ids=(tokenizer.eos_token_id,), seed=0,
        prompt_key=prompts.key_P,
    )  # fmt: skip
    texts = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(rollouts.tokens, rollouts.length.tolist(), strict=True)]
    return prompts, rollouts, texts


def sample_scores(heads: dict[str, Head], prompts, rollouts) -> dict[str, Tensor]:
    """name -> scores float64 [P, G]."""
    layers = sorted({h.layer for h in heads.values()})
    pooled, _ = frozen_forward(load(quickstart.model_folder()), groups(prompts, rollouts), layers, temperature=None)
    return {name: h(pooled[h.layer]).view(len(prompts), -1) for name, h in heads.items()}


def describe(scores: dict[str, Tensor], kinds: list[str], rollouts) -> dict[str, dict[str, float]]:
    """Per kind of prompt: correlations within prompts (scores centred per prompt, pooled) and standard deviations within prompts."""
    columns = {
        "helpfulness": scores["helpfulness"], "-harm": -scores["harm"], "harm": scores["harm"], "harm-audit": scores["harm-audit"],
        "length": rollouts.length.view(len(kinds), -1).double(), "finished": rollouts.finished.view(len(kinds), -1).double(),
    }  # fmt: skip
    asked = [("helpfulness", "-harm"), ("harm", "harm-audit")]
    asked += [(name, other) for name in ("helpfulness", "harm", "harm-audit") for other in ("length", "finished")]
    result = {}
    for kind in ("all", "delicate", "everyday"):
        chosen = torch.tensor([kind in ("all", k) for k in kinds])
        centred = {name: (x[chosen] - x[chosen].mean(1, keepdim=True)) for name, x in columns.items()}
        result[kind] = {f"{a}, {b}": float((centred[a] * centred[b]).sum() / (centred[a].norm() * centred[b].norm())) for a, b in asked}
        result[kind] |= {f"sd of {name}": float(centred[name].square().mean().sqrt()) for name in ("helpfulness", "harm", "harm-audit")}
    return result


def sample_table(described: dict[str, dict[str, float]]) -> str:
    """The figures of `describe` as a Markdown table."""
    lines = ["| within prompts | " + " | ".join(described) + " |", "|---|" + "---|" * len(described)]
    return "\n".join(lines + [f"| {key} | " + " | ".join(f"{d[key]:.2f}" for d in described.values()) + " |" for key in described["all"]])


if __name__ == "__main__":
    sys.exit(main())
