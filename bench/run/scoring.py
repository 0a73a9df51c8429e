"""Scoring by a sequence classifier: the scorer that shares prompts, and transformers, on the same texts.

Both write and tokenise the texts anew in each call. The floor is the bare matrix products of the packed
texts, each prompt once.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from bench.run import shapes
from bench.run.candidates import timed
from bench.run.options import Device, Dtype, Model, Repeats, Save, Shape
from bench.run.origin import origin
from bench.run.products import bare_products, layer_matrices
from bench.run.tables import Table, candidate_table, floor_shares, ratio_and_memory, times, token_rate
from engine.model.decoder import Decoder
from engine.model.folder import text_files
from engine.model.names import to_hugging_face
from engine.model.tokenizer import load_tokenizer
from engine.scorers import last_token
from engine.scorers.base import LoadContext
from engine.scorers.classifiers import load_classifier
from engine.scorers.models import model_scorer
from engine.scorers.recipes import Recipe

WORDS = "the a of river light and stone over quick letter seven to winter paper between asks".split()


@dataclass(frozen=True)
class Scoring:
    """Scores of responses by a sequence classifier: prompts shared among their responses,
    against transformers."""

    model: Model = ""
    shape: Shape = ""
    prompts: int = 4
    """Number of prompts."""
    responses: int = 8
    """Responses to each prompt."""
    prompt: int = 60
    """Words of each prompt; a guard's questions have about 300."""
    response: int = 40
    """Words of each response."""
    dtype: Dtype = "float32"
    device: Device = "cpu"
    repeats: Repeats = 5
    save: Save = True


def run(config: Scoring) -> dict:
    """Measures; returns the line of results.jsonl."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    with (
        TemporaryDirectory() as scratch,
        shapes.opened(config.model, config.shape, dtype, device) as (name, folder, model),
    ):
        place = Path(scratch) / "classifier"
        write_classifier(place, folder, model)
        context = LoadContext(trunk="", device=device, loaded={}, dtype=dtype)
        ours, stock = model_scorer(str(place), context), load_classifier(str(place), place, Recipe(), context)
        scores = {"dualign": ours, "transformers": lambda *asked: stock.logits(*asked)[:, 0].double()}
        asked = texts(config, 0)
        difference = float((scores["dualign"](*asked) - scores["transformers"](*asked)).abs().max())
        if dtype == torch.float32 and not difference <= 1e-3:
            raise SystemExit(f"scores differ by {difference:.0e}: more than 1e-3; nothing is timed")
        ids = stock.reader.encode(*asked)["input_ids"]
        packed = sum(group.tokens for group in last_token.shared(asked[0], ids))
        products = {"layers": bare_products(layer_matrices(model), packed)}
        # Each call has texts of its own: a scorer keeps the scores of its last ones.
        numbers = count(1)
        steps = {by: lambda score=score: score(*texts(config, next(numbers))) for by, score in scores.items()}
        measured = timed(steps, products, config.repeats, device, dtype=dtype)
    return {
        "case": "scoring",
        "shape": name,
        "rows": config.prompts * config.responses,
        "prompt": config.prompt,
        "new": config.response,
        "dtype": config.dtype,
        "keep_pages": False,
        "difference": difference,
        "tokens": sum(map(len, ids)),
        "packed_tokens": packed,
        **measured,
        **origin(device),
    }


def table(line: dict) -> Table:
    """Returns the table of a line."""
    title = f"scoring: {line['shape']}, {line['rows']} responses of {line['new']} words to prompts of "
    title += f"{line['prompt']}, {line['dtype']}; {line['tokens']} tokens, {line['packed_tokens']} with each "
    title += f"prompt once; floor (bare products of these) {1000 * line['floor_s']:.0f} ms"
    columns = times() | floor_shares(line) | ratio_and_memory(line) | token_rate(line)
    return candidate_table(line, title, columns)


def texts(config: Scoring, number: int) -> tuple[list[str], list[str]]:
    """Makes prompts and responses of random words, prompt-major; others for each number."""
    generator = torch.Generator().manual_seed(number)

    def words(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())

    prompts = [words(config.prompt) for _ in range(config.prompts)]
    asked = [prompt for prompt in prompts for _ in range(config.responses)]
    return asked, [words(config.response) for _ in asked]


def write_classifier(place: Path, folder: Path, model: Decoder) -> None:
    """Writes a sequence classifier of one label with the weights of a decoder and a random head.

    Texts are padded by the tokenizer's padding token, so that transformers batches them.
    """
    place.mkdir()
    for name in text_files(folder):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, place / name)
    tensors = {
        name: weight.cpu() for name, weight in to_hugging_face(model.state_dict(), model.config).items()
    }
    tensors.pop("lm_head.weight", None)
    score = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    tensors["score.weight"] = score.to(model.dtype)
    contiguous = {name: weight.contiguous() for name, weight in tensors.items()}
    save_file(contiguous, place / "model.safetensors", metadata={"format": "pt"})
    (architecture,) = model.raw_config["architectures"]
    changes = {
        "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": load_tokenizer(folder).pad_token_id,
    }
    (place / "config.json").write_text(json.dumps(model.raw_config | changes))
