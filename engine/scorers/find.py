"""From the value of --reward, --cost or --audit to a scorer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch

from engine.errors import UserError
from engine.scorers.base import Head, Scorer, Scorers, Shared, TextFunction, TextScorer
from engine.scorers.classifiers import classifier
from engine.scorers.functions import python_function
from engine.scorers.heads import on_its_own_trunk


def load_scorers(reward: str, costs: Sequence[str], audits: Sequence[str], *, folder: Path, trunk: str, device: torch.device) -> Scorers:
    """The scorers that the names stand for (see `find_scorer`). folder, trunk: the policy's checkpoint and its fingerprint.

    Raises: UserError as `find_scorer`, and when two costs have one name, before any of them is loaded.
    """
    found = [find_scorer(spec, folder) for spec in (reward, *costs, *audits)]
    names = [one.name for one in found[1:]]
    for name in names:
        if name == "reward":
            raise UserError("--cost and --audit: reward is what the reward is called in all tables; give another name: NAME=SCORER.")
        if names.count(name) > 1:
            raise UserError(f"--cost and --audit: two scorers are named {name}; give each its own name: NAME=SCORER.")
    shared: Shared = {}
    first, *others = (one.load(trunk, device, shared) for one in found)
    return Scorers(reward=first, costs=tuple(others[: len(costs)]), audits=tuple(others[len(costs) :]))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a --reward, --cost or --audit value stands for, before weights are loaded."""

    name: str
    sign: int = 1
    load_as: Callable[[str, torch.device, "Shared"], "Head | TextFunction"]  # of the policy's fingerprint, the device, models loaded before

    def load(self, trunk: str, device: torch.device, shared: "Shared | None" = None) -> Scorer:
        """Load it; a model in `shared` serves again, another one is added. Raises: UserError where it cannot be."""
        what = self.load_as(trunk, device, {} if shared is None else shared)
        if isinstance(what, Head):
            return replace(what, name=self.name, sign=self.sign)
        return TextScorer(name=self.name, function=what, sign=self.sign)


def find_scorer(spec: str, folder: Path) -> Found:
    """The scorer of one --reward, --cost or --audit value: a head's name (in the policy's `folder` under heads/, or shipped), a head
    folder, module:function, or a sequence-classification model's folder or hub id, with #label where it has several labels. NAME= before it
    gives another name, NAME=- takes its negative as well.

    Raises: UserError naming the value and the forms accepted.
    """
    name, equals, named = spec.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name) and not Path(spec).exists():
        own = find_scorer(named.removeprefix("-"), folder)
        return replace(own, name=name, sign=-own.sign if named.startswith("-") else own.sign)
    shipped = Path(str(files("engine"))) / "assets" / "heads"
    places = [place for place in (folder / "heads" / spec, shipped / spec, Path(spec)) if (place / "head.safetensors").is_file()]
    if places:
        head = Head.load(places[0])
        return Found(name=head.name, load_as=lambda trunk, *where: head if head.trunk == trunk else on_its_own_trunk(head, *where))
    if ":" in spec and not Path(spec).exists():
        return Found(name=spec.partition(":")[2], load_as=lambda trunk, *where: python_function(spec))
    path = spec.partition("#")[0]
    if Path(path).is_dir() or spec.count("/") == 1:
        return Found(name=Path(path).name, load_as=lambda trunk, *where: classifier(spec, *where))
    names = sorted(p.parent.name for p in shipped.glob("*/head.safetensors"))
    raise UserError(
        f"scorer {spec}: not found; give a shipped head ({', '.join(names)}), a head folder, a model folder or hub id, or module:function."
    )
