"""The settings of runs, one flat dataclass per algorithm, and what may stand in them."""

from engine.config.algorithms import (
    SHOWN,
    CaidConfig,
    CdpoConfig,
    DpoConfig,
    MocanConfig,
    OpdConfig,
    PdDpoConfig,
    PecanConfig,
    PrimalDualConfig,
    RepoConfig,
    SacpoConfig,
    SafeDpoConfig,
    by_preference,
    pairs_file,
    policy_updates,
    shown_name,
    trained_responses,
    was_by_preference,
)
from engine.config.bounds import MAY_BE_INFINITE, check
from engine.config.evaluation import EvaluateConfig, check_evaluate
from engine.config.presets import SAMPLING, SMOKE, fit, smoke
from engine.config.run import IterativeConfig, RunConfig

__all__ = [
    "CaidConfig",
    "CdpoConfig",
    "DpoConfig",
    "EvaluateConfig",
    "IterativeConfig",
    "MAY_BE_INFINITE",
    "MocanConfig",
    "OpdConfig",
    "PdDpoConfig",
    "PecanConfig",
    "PrimalDualConfig",
    "RepoConfig",
    "RunConfig",
    "SAMPLING",
    "SHOWN",
    "SMOKE",
    "SacpoConfig",
    "SafeDpoConfig",
    "by_preference",
    "check",
    "check_evaluate",
    "fit",
    "pairs_file",
    "policy_updates",
    "shown_name",
    "smoke",
    "trained_responses",
    "was_by_preference",
]
