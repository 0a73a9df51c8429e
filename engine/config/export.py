"""The settings of `engine.export`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the last iterate of a run, where it is met, as a merged Hugging Face folder with a model card."""

    verdict: str = ""
    """Folder of the verdict on the last iterate, such as RUN/evaluation-1. Default: the run's own."""
    even_if: bool = False
    """Export a policy that is not met, or has no verdict yet; its model card says so."""
    or_reference: bool = False
    """Where the policy is not met, export the reference instead, the model before training; its model card
    says that no solution was found."""
    push_to_hub: str = ""
    """Also upload the folder to this repository of the hub, OWNER/NAME, with the token of `hf auth login`."""
