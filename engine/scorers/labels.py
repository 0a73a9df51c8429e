"""The labels of a classifier, and the score that is read from their logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.errors import UserError
from engine.scorers.names import ModelSpec

LOGIT = ":logit"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a classifier, in the order of its logits."""

    names: tuple[str, ...]
    independent: bool = False  # each has a probability of its own: a sigmoid, not a softmax over all

    @staticmethod
    def of(config: dict, n: int) -> "Labels":
        """Names n logits: as a config.json does where it has so many labels, else LABEL_0 and so on."""
        named = config.get("id2label")
        named = named if isinstance(named, dict) else {}
        names = tuple(str(named.get(str(i), named.get(i, f"LABEL_{i}"))) for i in range(n))
        if len(named) != n or len(set(names)) != n:
            names = tuple(f"LABEL_{i}" for i in range(n))
        return Labels(names=names, independent=config.get("problem_type") == "multi_label_classification")

    def score(self, spec: ModelSpec) -> Callable[[Tensor], list[float]]:
        """Returns the function from logits [N, labels] to the scores of the label that `spec` names.

        A score is the label's log-odds. It is the logit of a model of one label, of a label that is
        independent of the others, and of LABEL:logit. Without a label, of two the second is meant.
        Raises: UserError where there is no such label, or several and none is named.
        """
        label, names = spec.label, ", ".join(self.names)
        raw = label.endswith(LOGIT) and label not in self.names
        label = label.removesuffix(LOGIT) if raw else label
        numbered = {str(i): i for i in range(len(self.names))} | {n: i for i, n in enumerate(self.names)}
        if label and label not in numbered:
            raise UserError(f"scorer {spec}: the model has no label {label}; it has {names}.")
        if not label and len(self.names) > (1 if self.independent or raw else 2):
            raise UserError(
                f"scorer {spec}: the model has {len(self.names)} labels ({names}); name one: "
                f"{spec._replace(label=self.names[0])}."
            )
        column = numbered[label] if label else len(self.names) - 1

        def scores(logits_NL: Tensor) -> list[float]:
            if raw or self.independent or logits_NL.shape[1] == 1:
                return logits_NL[:, column].tolist()
            others = logits_NL.clone()
            others[:, column] = -math.inf
            return (logits_NL[:, column] - others.logsumexp(dim=1)).tolist()

        return scores
