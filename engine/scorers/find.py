"""From the value of --reward, --cost or --audit to a scorer."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine import quickstart
from engine.config import RunConfig
from engine.errors import UserError
from engine.files import sha256_of_file
from engine.model.folder import resolve
from engine.run.needs import ScorerSize
from engine.scorers.base import Head, LoadContext, Scorer, Scorers, TextScorer
from engine.scorers.built_in import BUILT_IN, built_in
from engine.scorers.functions import python_function, source_file
from engine.scorers.heads import find_head, load_head, shipped_heads
from engine.scorers.models import model_scorer, model_size, read_files
from engine.scorers.names import LONGEST, ModelSpec, is_name
from engine.scorers.remote_forms import RemoteSpec, is_remote


def load_scorers(
    reward: str,
    costs: Sequence[str],
    audits: Sequence[str],
    *,
    folder: Path,
    trunk: str,
    device: torch.device,
    **context: Any,
) -> Scorers:
    """Loads the scorers of a run, see `find_scorer`.

    folder, trunk: the policy's checkpoint and its fingerprint. context: other fields of `LoadContext`.
    Raises: UserError as `find_scorer`, and before any scorer is loaded where two costs have one name.
    """
    unloaded = _find_all(reward, costs, audits, folder)
    loaded: dict[str, object] = {}
    first, *others = (scorer.load(trunk, device, loaded=loaded, **context) for scorer in unloaded)
    return Scorers(reward=first, costs=tuple(others[: len(costs)]), audits=tuple(others[len(costs) :]))


def content(
    reward: str, costs: Sequence[str], audits: Sequence[str], *, folder: Path
) -> dict[str, dict[str, str]]:
    """Says what each scorer of a run is by its content, by the name that tables give it ("reward", costs,
    audits): {"form": "head", "classifier", "function", "judge" or "built-in", "source": its files, folder or
    address, "sha256": their digest}. Nothing is loaded.

    folder: the policy's checkpoint. Raises: UserError as `load_scorers`, and where a file cannot be read.
    """
    first, *others = _find_all(reward, costs, audits, folder)
    return {"reward": first.content(), **{scorer.name: scorer.content() for scorer in others}}


def sizes(
    config: RunConfig,
    *,
    folder: Path,
    trunk: str,
    dtype: torch.dtype,
    device: torch.device,
    known: Sequence[bool] = (),
) -> list[ScorerSize]:
    """Says what the models of a run's scorers cost beside the policy's, each model once. Nothing is loaded.

    folder, trunk: the policy's checkpoint and its fingerprint. known: for each scorer whether there are
    scores of the reference's responses already. Raises: UserError as `load_scorers`.
    """
    found: dict[Path, ScorerSize] = {}
    unloaded = _find_all(config.reward, config.cost, config.audit, folder)
    for scorer, is_known in zip(unloaded, known or [False] * len(unloaded), strict=True):
        if scorer.model is not None and (model := scorer.model(trunk)) is not None:
            # Heads on another trunk than the policy's read it in float32.
            wide = torch.float32 if scorer.form == "head" else dtype
            place = model.resolve()
            spared = is_known and (place not in found or found[place].spared)
            found[place] = replace(model_size(model, wide, device), spared=spared)
    return list(found.values())


def score_names(config: RunConfig, folder: Path) -> list[str]:
    """Names the scores of a run as tables do: reward, costs, audits. folder: the policy's checkpoint.

    Raises: UserError as `load_scorers`.
    """
    _, *others = _find_all(config.reward, config.cost, config.audit, folder)
    return ["reward", *(scorer.name for scorer in others)]


def take_rows(specs: Sequence[str], folder: Path) -> bool:
    """Tells whether one of some scorers takes the rows that prompts are read from. Functions are imported for
    it. folder: the policy's checkpoint. Raises: UserError as `find_scorer`, and where an import fails."""
    unloaded = [find_scorer(spec, folder) for spec in specs]
    functions = [scorer.load("", torch.device("cpu")) for scorer in unloaded if scorer.form == "function"]
    return any("row" in function.keywords for function in functions)


def _find_all(
    reward: str, costs: Sequence[str], audits: Sequence[str], folder: Path
) -> list["UnloadedScorer"]:
    """Finds all scorers of a run. Raises: UserError where one is not found, or two costs have one name."""
    unloaded = [find_scorer(spec, folder) for spec in (reward, *costs, *audits)]
    names = [scorer.name for scorer in unloaded[1:]]
    for name in names:
        if name == "reward":
            raise UserError(
                "--cost and --audit: reward is what the reward is called in all tables; "
                "give another name: NAME=SCORER."
            )
        if names.count(name) > 1:
            raise UserError(
                f"--cost and --audit: two scorers are named {name}; give each its own name: NAME=SCORER."
            )
    return unloaded


@dataclass(frozen=True, kw_only=True)
class UnloadedScorer:
    """A scorer that a --reward, --cost or --audit value names, before its weights are loaded."""

    name: str
    sign: int = 1
    form: str  # head, classifier, function, judge or built-in
    # The file, folder or address that it is read from, and by name each file that it depends on.
    files: Callable[[], tuple[Path | str, dict[str, Path]]]
    texts: tuple[str, ...] = ()  # what else it depends on
    load_as: Callable[[LoadContext], Head | TextScorer]
    # The folder of the model that it loads beside the policy's, by whose fingerprint it is told apart.
    model: Callable[[str], Path | None] | None = None

    def load(self, trunk: str, device: torch.device, **context: Any) -> Scorer:
        """Loads the weights.

        trunk: fingerprint of the policy's checkpoint. context: other fields of `LoadContext`.
        Raises: UserError where it cannot be loaded.
        """
        loading = LoadContext(trunk=trunk, device=device, **{"loaded": {}, **context})
        return replace(self.load_as(loading), name=self.name, sign=self.sign)

    def content(self) -> dict[str, str]:
        """Says what the scorer is by its content; see `content`."""
        source, files = self.files()
        digest = hashlib.sha256()
        for name, file in sorted(files.items()):
            try:
                of_file = sha256_of_file(file)
            except OSError as error:
                raise UserError(
                    f"scorer {self.name}: {file} cannot be read ({error.strerror}); make it readable."
                ) from error
            digest.update(f"{of_file} {name}\n".encode())
        for text in self.texts:
            digest.update(f"{text}\n".encode())
        return {"form": self.form, "source": str(source), "sha256": digest.hexdigest()}


def find_scorer(spec: str, folder: Path) -> UnloadedScorer:
    """Finds the scorer that one --reward, --cost or --audit value names; `folder` is the policy's.

        HEAD               a head: in the policy's folder under heads/, shipped, or its folder (heads.py)
        module:function    a Python function (functions.py)
        MODEL[#LABEL][@RECIPE]   the folder or hub id of a classifier, a reward or cost model or a guard
                           (models.py); recipes.py lists the recipes
        http://HOST/PATH[#MODEL[@RECIPE]]   a judge behind HTTP or HTTPS (remote_forms.py)
        length, refusal    the tokens of a response; 1 for a refusal (built_in.py)
        NAME=SCORER        any of these under another name; NAME=-SCORER and -SCORER take its negative

    Raises: UserError naming the value and the accepted forms.
    """
    try:
        scorer = _find(spec, folder)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"scorer {spec:.60}: cannot be looked for ({reason}); give another one.") from error
    if not is_name(scorer.name):
        raise UserError(
            f"scorer {spec:.60}: {scorer.name!r:.60} cannot name it in tables; give it a name of at most "
            f"{LONGEST} bytes: NAME=SCORER."
        )
    return scorer


def _is_named(spec: str) -> bool:
    """Tells whether a specification is NAME=SCORER."""
    name, equals, _ = spec.partition("=")
    return bool(equals and re.fullmatch(r"[\w-]+", name)) and not Path(spec).exists()


def _find(spec: str, folder: Path) -> UnloadedScorer:
    name, _, renamed = spec.partition("=")
    if _is_named(spec):
        if _is_named(inner := renamed.removeprefix("-")):
            raise UserError(
                f"scorer {spec}: it has two names; give it one: {name}={inner.partition('=')[2]}."
            )
        if renamed.startswith("--") and not Path(inner).exists():
            raise _two_signs(spec)
        scorer = _find(inner, folder)
        return replace(scorer, name=name, sign=-scorer.sign if renamed.startswith("-") else scorer.sign)
    if spec.startswith("-") and not Path(spec).exists():
        if spec.startswith("--"):
            raise _two_signs(spec)
        scorer = _find(spec[1:], folder)
        return replace(scorer, sign=-scorer.sign)
    if is_remote(spec):
        return _judge(RemoteSpec.of(spec))
    if (at := find_head(spec, folder)) is not None:
        head, file = Head.load(at), at / "head.safetensors"
        return UnloadedScorer(
            name=head.name,
            form="head",
            files=lambda: (file, {file.name: file}),
            load_as=lambda context: load_head(head, context, folder),
            model=lambda trunk: None if head.trunk == trunk else quickstart.model_folder(),
        )
    if spec in BUILT_IN and not Path(spec).exists():
        return UnloadedScorer(
            name=spec,
            form="built-in",
            files=lambda: (spec, {}),
            texts=(spec, *BUILT_IN[spec]),
            load_as=lambda context: built_in(spec, context),
        )
    model = ModelSpec.of(spec)
    if Path(model.path).is_dir() or (model.path.count("/") == 1 and ":" not in model.path):
        return UnloadedScorer(
            name=Path(model.path).name,
            form="classifier",
            files=lambda: read_files(model.path),
            load_as=lambda context: model_scorer(spec, context),
            model=lambda trunk: resolve(model.path),
        )
    if ":" in spec and not Path(spec).exists():

        def source() -> tuple[Path, dict[str, Path]]:
            file = source_file(spec)
            return file, {file.name: file}

        return UnloadedScorer(
            name=spec.partition(":")[2],
            form="function",
            files=source,
            load_as=lambda context: python_function(spec),
        )
    raise UserError(
        f"scorer {spec}: not found; give a shipped head ({', '.join(shipped_heads())}), a head folder, "
        "a model folder or hub id, module:function, the http:// address of a judge, length or refusal."
    )


def _two_signs(spec: str) -> UserError:
    return UserError(f"scorer {spec}: two minus signs; one takes the negative, none the score itself.")


def _judge(spec: RemoteSpec) -> UnloadedScorer:
    def load_as(context: LoadContext) -> TextScorer:
        # The client library takes a while to import, and few runs need it.
        from engine.scorers.remote import judge_scorer

        return judge_scorer(spec, context)

    return UnloadedScorer(name=spec.name, form="judge", files=spec.files, texts=spec, load_as=load_as)
