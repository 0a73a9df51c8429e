"""From the value of --reward, --cost or --audit to a scorer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import UserError
from engine.scorers.base import Head, LoadContext, Scorer, Scorers, TextFunction, TextScorer
from engine.scorers.classifiers import classifier
from engine.scorers.functions import python_function
from engine.scorers.heads import find_head, load_head, shipped_heads


def load_scorers(
    reward: str,
    costs: Sequence[str],
    audits: Sequence[str],
    *,
    folder: Path,
    trunk: str,
    device: torch.device,
) -> Scorers:
    """Loads the scorers of a run, see `find_scorer`.

    folder, trunk: the policy's checkpoint and its fingerprint.
    Raises: UserError as `find_scorer`, and before any scorer is loaded where two costs have one name.
    """
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
    loaded: dict[str, object] = {}
    first, *others = (scorer.load(trunk, device, loaded) for scorer in unloaded)
    return Scorers(reward=first, costs=tuple(others[: len(costs)]), audits=tuple(others[len(costs) :]))


@dataclass(frozen=True, kw_only=True)
class UnloadedScorer:
    """A scorer that a --reward, --cost or --audit value names, before its weights are loaded."""

    name: str
    sign: int = 1
    load_as: Callable[[LoadContext], Head | TextFunction]

    def load(self, trunk: str, device: torch.device, loaded: dict[str, object] | None = None) -> Scorer:
        """Loads the weights.

        trunk: fingerprint of the policy's checkpoint. loaded: models of other scorers, which are shared.
        Raises: UserError where it cannot be loaded.
        """
        context = LoadContext(trunk=trunk, device=device, loaded={} if loaded is None else loaded)
        head_or_function = self.load_as(context)
        if isinstance(head_or_function, Head):
            return replace(head_or_function, name=self.name, sign=self.sign)
        return TextScorer(name=self.name, function=head_or_function, sign=self.sign)


def find_scorer(spec: str, folder: Path) -> UnloadedScorer:
    """Finds the scorer that one --reward, --cost or --audit value names; `folder` is the policy's.

        HEAD               a head: in the policy's folder under heads/, shipped, or its folder (heads.py)
        module:function    a Python function (functions.py)
        MODEL[#LABEL]      the folder or hub id of a sequence-classification model (classifiers.py)
        NAME=SCORER        any of these under another name; NAME=-SCORER takes its negative

    Raises: UserError naming the value and the accepted forms.
    """
    name, equals, renamed = spec.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name) and not Path(spec).exists():
        scorer = find_scorer(renamed.removeprefix("-"), folder)
        return replace(scorer, name=name, sign=-scorer.sign if renamed.startswith("-") else scorer.sign)
    if (head := find_head(spec, folder)) is not None:
        return UnloadedScorer(name=head.name, load_as=lambda context: load_head(head, context))
    if ":" in spec and not Path(spec).exists():
        return UnloadedScorer(name=spec.partition(":")[2], load_as=lambda context: python_function(spec))
    path = spec.partition("#")[0]
    if Path(path).is_dir() or spec.count("/") == 1:
        return UnloadedScorer(name=Path(path).name, load_as=lambda context: classifier(spec, context))
    raise UserError(
        f"scorer {spec}: not found; give a shipped head ({', '.join(shipped_heads())}), a head folder, "
        "a model folder or hub id, or module:function."
    )


def contents_of(config, folder: Path) -> dict[str, dict[str, str]]:
    """STUB."""
    import hashlib
    import sys
    from engine.scorers.heads import SHIPPED
    found = {}
    for spec in (config.reward, *config.cost, *config.audit):
        name, equals, rest = spec.partition("=")
        body = rest.removeprefix("-") if equals else spec
        data = b""
        if ":" in body:
            module = body.partition(":")[0]
            import importlib.util
            origin = importlib.util.find_spec(module).origin
            data = Path(origin).read_bytes()
        else:
            for place in (folder / "heads" / body, SHIPPED / body, Path(body)):
                if (place / "head.safetensors").is_file():
                    data = (place / "head.safetensors").read_bytes(); break
        found[name] = {"form": "x", "source": body, "sha256": hashlib.sha256(data).hexdigest()}
    return found
