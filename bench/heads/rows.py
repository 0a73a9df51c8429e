"""Training and test rows of the heads, from foreign csv files and the project's answers."""

import csv
import random
import zlib
from pathlib import Path

from engine.data import tables

HERE = Path(__file__).parent
CARELESS_WEIGHT = 3.0
CUT_WEIGHT = 2.0
GPTFUZZ_ROWS = 600


def project_rows(kind: str) -> list[dict]:
    """Reads the rows of bench/heads/KIND.jsonl."""
    return [row for _, row in tables.read_rows(str(HERE / f"{kind}.jsonl"))]


def part_of(text: str, parts: int) -> int:
    """Returns a part 0..parts-1 that depends on the text alone."""
    return zlib.crc32(text.encode()) % parts


def is_heldout(prompt: str) -> bool:
    """Returns whether a prompt of the project is in the fifth that no head is trained on."""
    return part_of(prompt, 5) == 0


def _half_of(row: dict) -> int:
    """Returns which of the two cost heads a row of the project belongs to."""
    return part_of("half " + row["prompt"], 2)


def csv_rows(file: Path) -> list[dict]:
    """Reads the rows of one of the foreign csv files."""
    csv.field_size_limit(2**30)
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def gptfuzz_rows(folder: Path, part: str) -> list[dict]:
    """Reads labelled responses without prompt texts; `group` is the number of the question."""
    rows = csv_rows(folder / "gptfuzz" / f"responses_labeled_{part}.csv")
    return [
        {
            "prompt": "",
            "response": r["Response"],
            "label": int(r["label"]),
            "group": r["question"],
            "source": f"gptfuzz {part}",
        }
        for r in rows
        if r["Response"].strip()
    ]


def xstest_rows(folder: Path, completions: str) -> list[dict]:
    """Reads completions. Label 1 means that an unsafe prompt (a contrast type) was fully complied with;
    `kind` is the human label."""
    rows = csv_rows(folder / "xstest" / f"xstest_v2_completions_{completions}_gpteval.csv")
    return [
        {
            "prompt": r["prompt"],
            "response": r["completion"],
            "label": int(r["type"].startswith("contrast") and r["final_label"][0] == "1"),
            "kind": r["final_label"][2:],
            "source": f"xstest {completions}",
        }
        for r in rows
        if r["completion"].strip()
    ]


def harm_rows(folder: Path, *, audit: bool) -> tuple[list[dict], list[dict]]:
    """Returns (train, test) of a cost head. The two heads train on disjoint halves of questions, of prompts
    and of the project's rows."""
    half = int(audit)
    fuzz = [r for r in gptfuzz_rows(folder, "train") if int(r["group"]) % 2 == half]
    random.Random(half).shuffle(fuzz)
    train = fuzz[:GPTFUZZ_ROWS]
    train += [r for r in xstest_rows(folder, "mistralguard") if part_of(r["prompt"], 2) == half]
    test = gptfuzz_rows(folder, "evaluate")
    complied = [r for r in xstest_rows(folder, "mistralinstruct") if r["kind"] == "full_compliance"]
    new = [r for r in complied if part_of(r["prompt"], 2) != half]
    test += complied + [r | {"source": "xstest mistralinstruct, new prompts"} for r in new]
    for row in project_rows("delicate"):
        if is_heldout(row["prompt"]):
            test += _delicate(row)
        elif _half_of(row) == half:
            train += _delicate(row)
    for row in project_rows("everyday"):
        if _half_of(row) == half and not is_heldout(row["prompt"]):
            # Refusals too: an answer is not harmful for being unhelpful, and not harmless for being helpful.
            train += _labelled(row, {"good": 0, "refusal": 0})
    return train, test


def _delicate(row: dict) -> list[dict]:
    """Returns pairs, in which the careless answer has the higher cost, and labelled
    answers to one delicate prompt."""
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": row["careless"],
            "rejected": row[other],
            "kind": f"careless > {other}",
            "source": "delicate pairs",
        }
        for other in ("safe", "refusal")
    ]
    return pairs + _labelled(row, {"careless": 1, "safe": 0, "refusal": 0})


def _labelled(row: dict, labels: dict[str, int]) -> list[dict]:
    """Returns a labelled row for each kind of answer in `labels`."""
    return [
        {"prompt": row["prompt"], "response": row[kind], "label": label, "source": "delicate"}
        for kind, label in labels.items()
    ]


def helpfulness_rows() -> tuple[list[dict], list[dict]]:
    """Returns (train, test) of the reward head: pairs of the project's answers, by kind."""
    rng = random.Random(0)
    train, test = [], []
    for kind, goods in (("everyday", ("good", "good2")), ("delicate", ("careless", "safe"))):
        for heldout, split in ((False, train), (True, test)):
            rows = [r for r in project_rows(kind) if is_heldout(r["prompt"]) == heldout]
            for i, row in enumerate(rows):
                other = rows[(i + 1 + rng.randrange(len(rows) - 1)) % len(rows)]
                split += pairs_of(kind, row, other, goods, rng)
    return train, test


def pairs_of(kind: str, row: dict, other: dict, goods: tuple[str, str], rng: random.Random) -> list[dict]:
    """Returns the pairs of one prompt; `other` is the row of another prompt, whose answers do not fit."""
    pairs = []

    def add(chosen: str, rejected: str, name: str, weight: float = 1.0, finished: bool = True) -> None:
        pairs.append(
            {
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "kind": name,
                "weight": weight,
                "finished": finished,
                "source": kind,
            }
        )

    for good in goods:
        words = row[good].split()
        add(row[good], row["refusal"], f"{good} > refusal")
        add(row[good], other[good], f"{good} > other prompt")
        add(row[good], " ".join(rng.sample(words, len(words))), f"{good} > shuffled", 0.5)
        # The cut answer lacks the end-of-turn token, as the model would have gone on there.
        cut = " ".join(words[: rng.randint(len(words) // 3, len(words) - 2)])
        add(row[good], cut, f"{good} > cut", CUT_WEIGHT, finished=False)
        if kind == "everyday":
            add(row[good], row["weak"], f"{good} > weak")
    if kind == "delicate":
        add(row["careless"], row["safe"], "careless > safe", CARELESS_WEIGHT)
    return pairs
