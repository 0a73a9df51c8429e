"""The settings of runs, one flat dataclass per algorithm, and what may stand in them."""

from engine.config.algorithms import (
    ALGORITHMS,
    Algorithm,
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
    shown_name,
    was_by_preference,
)
from engine.config.bounds import check
from engine.config.evaluation import EvaluateConfig
from engine.config.presets import SAMPLING, SMOKE, fit, smoke
from engine.config.run import IterativeConfig, RunConfig

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "CaidConfig",
    "CdpoConfig",
    "DpoConfig",
    "EvaluateConfig",
    "IterativeConfig",
    "MocanConfig",
    "OpdConfig",
    "PdDpoConfig",
    "PecanConfig",
    "PrimalDualConfig",
    "RepoConfig",
    "RunConfig",
    "SAMPLING",
    "SMOKE",
    "SacpoConfig",
    "SafeDpoConfig",
    "check",
    "fit",
    "shown_name",
    "smoke",
    "was_by_preference",
]
