"""Models as scorers: which kind a folder is, and how it is asked."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import is_file, one_line, shown
from engine.model.checkpoint import read_config, stored_tensors
from engine.model.folder import check_text_files, resolve
from engine.model.tokenizer import library_warnings_off, refuse_code
from engine.run.needs import ScorerSize
from engine.scorers import guards, last_token
from engine.scorers.base import Asked, LastForward, LoadContext, Sampled, TextScorer
from engine.scorers.classifiers import Classifier, load_classifier, of_no_use
from engine.scorers.last_token import HeadFolder, LastToken
from engine.scorers.names import ModelSpec
from engine.scorers.reader import LONGEST_TEXT, Reader
from engine.scorers.recipes import CAUSAL, PAIRS, RECIPES, Recipe, recipe_named, recipe_of_folder

# Matrices of which a token takes a row, and those of which only answers take some.
_LOOKED_UP = re.compile(r"embed|wte|wpe|lm_head")


def read_files(path_or_id: str) -> tuple[Path, dict[str, Path]]:
    """Finds a model's folder, and by name every file in it that loading may read.

    Raises: UserError where there is no such folder.
    """
    folder = resolve(path_or_id)
    suffixes = {".json", ".safetensors", ".model", ".jinja", ".txt"}
    files = (file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    return folder, {str(file.relative_to(folder)): file for file in files}


def model_size(folder: Path, dtype: torch.dtype, device: torch.device) -> ScorerSize:
    """Says what a model of a folder costs, from config.json and the headers of its weights."""
    raw, stored = read_config(folder), stored_tensors(folder)
    parameters = sum(math.prod(tensor.shape) for tensor in stored.values())
    matrices = [
        tensor for name, tensor in stored.items() if len(tensor.shape) == 2 and not _LOOKED_UP.search(name)
    ]
    hidden, inner = (raw.get(key) for key in ("hidden_size", "intermediate_size"))
    numbers = 10 * hidden + 4 * inner if isinstance(hidden, int) and isinstance(inner, int) else 0
    own = last_token.examine(folder) is not None
    tokens = last_token.TOKENS_GPU if own and device.type == "cuda" else last_token.TOKENS_CPU
    return ScorerSize(
        weight_bytes=parameters * dtype.itemsize,
        working_bytes=tokens * numbers * dtype.itemsize,
        products=sum(math.prod(tensor.shape) for tensor in matrices),
        shares_prompts=own,
    )


def model_scorer(value: str, context: LoadContext) -> TextScorer:
    """Loads the scorer MODEL[#LABEL][@RECIPE].

    A head on one of the project's decoders and a guard are read by `last_token`, all others by transformers.
    Scorers of one folder share its weights, and those of one recipe the forward pass.
    Raises: UserError where the model cannot be loaded, or label or recipe do not fit it.
    """
    spec = ModelSpec.of(value)
    folder, given = resolve(spec.path), recipe_named(spec.recipe, value) if spec.recipe else None
    if is_file(folder / "adapter_config.json"):
        raise UserError(
            f"scorer {value}: an adapter and a model in one folder; "
            "merge the adapter into the model, or remove one of them."
        )
    found = last_token.examine(folder)
    check_text_files(folder)
    refuse_code(
        folder,
        ("tokenizer_config.json",) if found else ("config.json", "tokenizer_config.json"),
        cure="use a checkpoint without it, or let a server run it and give its http:// address",
    )
    if found is None and not last_token.causal(read_config(folder), stored_tensors(folder)):
        _check_recipe(value, given, given is None or given in [RECIPES[name] for name in PAIRS])
        model = _once(context, spec, lambda: load_classifier(value, folder, given or Recipe(), context))
        return _with_labels(value, spec, model)
    tokenizer = _once(context, ModelSpec(spec.path, recipe="tokenizer"), lambda: _tokenizer(value, folder))
    if found is None or found.kind == "causal":
        return _guard(value, found, folder, tokenizer, context)
    recipe = given or _recipe_of_head(value, found, tokenizer)
    _check_recipe(value, recipe, not recipe.steps and recipe.row is None)
    model = _once(context, spec, lambda: _with_head(value, found, recipe, tokenizer, context))
    return _with_labels(value, spec, model, found.config.get("score_type") or recipe.measures)


def _once(context: LoadContext, spec: ModelSpec, load) -> Any:
    """Loads what the scorers of one folder and recipe share."""
    key = str(spec._replace(label=""))
    if key not in context.loaded:
        context.loaded[key] = load()
    return context.loaded[key]


def _check_recipe(value: str, recipe: Recipe | None, fits: bool) -> None:
    if not fits:
        name = next(name for name, known in RECIPES.items() if known is recipe)
        raise UserError(
            f"scorer {value}: the recipe {name} is for another kind of model; this one is a classifier: "
            "leave the recipe out."
        )


def _recipe_of_head(value: str, found: HeadFolder, tokenizer) -> Recipe:
    """Returns how a head is asked where the user does not say it. Raises: UserError where nothing says it."""
    if found.kind == "beaver":
        return RECIPES["beaver"]
    named = recipe_of_folder(Path(ModelSpec.of(value).path).name) if found.kind == "regression" else ""
    if named in ("ultrarm", "eurus"):
        return RECIPES[named]
    if found.kind == "regression" and not tokenizer.chat_template:
        raise UserError(
            f"scorer {value}: nothing says how its text is written; give {value}@RECIPE, one of ultrarm, "
            "eurus and pair."
        )
    return Recipe()


def _with_head(value: str, found: HeadFolder, recipe: Recipe, tokenizer, context: LoadContext) -> Classifier:
    model = _weights(value, found, context)
    reader = _reader(value, recipe, tokenizer, found.checkpoint.config.max_positions, context)

    def logits(prompts: list[Asked], responses: list[str], sampled: Sampled | None = None) -> Tensor:
        ids = last_token.text_ids(reader, prompts, responses, sampled if recipe.sampled else None)
        return model.logits(prompts, ids, model.rows)

    notes = of_no_use(value, found.unused)
    return Classifier(
        logits=LastForward(logits), labels=model.labels, reader=reader, sampled=recipe.sampled, notes=notes
    )


def _weights(value: str, found: HeadFolder, context: LoadContext) -> LastToken:
    spec = ModelSpec(ModelSpec.of(value).path, recipe="weights")
    return _once(context, spec, lambda: last_token.load(value, found, context))


def _with_labels(value: str, spec: ModelSpec, model: Classifier, measures: str = "") -> TextScorer:
    read = model.labels.score(spec)
    keywords = ("sampled",) if model.sampled else ()

    def function(prompts: list[Asked], responses: list[str], sampled: Sampled | None = None) -> list[float]:
        return read(model.logits(prompts, responses, sampled))

    return TextScorer(
        name=value,
        function=function,
        reads_messages=True,
        keywords=keywords,
        max_tokens=model.reader.max_tokens,
        warnings=model.reader.warnings,
        measures=measures,
        notes=model.notes,
    )


def _guard(value: str, found: HeadFolder | None, folder: Path, tokenizer, context: LoadContext) -> TextScorer:
    """Returns the scorer of a language model. Raises: UserError without a recipe for one."""
    spec = ModelSpec.of(value)
    name = spec.recipe or recipe_of_folder(Path(spec.path).name)
    if name not in CAUSAL or spec.label:
        said = f"the recipe {name} is not for one" if name else "nothing says what of its answer is read"
        said = "it has no labels" if spec.label else said
        raise UserError(
            f"scorer {value}: a language model, and {said}; give {spec.path}@RECIPE, one of "
            f"{', '.join(CAUSAL)}."
        )
    recipe = RECIPES[name]
    if found is not None:
        model = _weights(value, found, context)
        longest = found.checkpoint.config.max_positions

        def logits(prompts: list[Asked], ids: list[list[int]], tokens: list[int]) -> Tensor:
            return model.logits(prompts, ids, model.outputs(tokens))
    else:
        spec = ModelSpec(spec.path, recipe="weights")
        network = _once(context, spec, lambda: guards.load_other(value, folder, context))
        longest, logits = guards.positions(network), guards.logits_of(network, context)
    reader = _reader(value, recipe, tokenizer, longest, context)
    guard = _once(
        context, ModelSpec(spec.path, recipe=name), lambda: guards.Guard.of(value, recipe, reader, logits)
    )
    return TextScorer(
        name=value,
        function=guard.scores,
        reads_messages=True,
        max_tokens=reader.max_tokens,
        warnings=guard.reader.warnings,
        measures=recipe.measures,
    )


def _reader(value: str, recipe: Recipe, tokenizer, positions: int, context: LoadContext) -> Reader:
    longest = min(LONGEST_TEXT, tokenizer.model_max_length, positions)
    return Reader(spec=value, tokenizer=tokenizer, max_tokens=longest, now=context.now, recipe=recipe)


def _tokenizer(value: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with library_warnings_off():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"scorer {value}: no tokenizer could be loaded ({shown(one_line(error))}); "
            "give a complete model folder."
        ) from error
