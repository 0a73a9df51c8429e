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
from engine.config.export import ExportConfig
from engine.config.kinds import IterativeConfig
from engine.config.presets import (
    PRESETS,
    SAMPLING,
    SMOKE,
    fit,
    hh_rlhf,
    preset_named,
    published,
    safe_rlhf,
    smoke,
    with_steps,
    without_epochs,
)
from engine.config.run import OF_THE_COMMAND, RunConfig

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "CaidConfig",
    "CdpoConfig",
    "DpoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "IterativeConfig",
    "MocanConfig",
    "OF_THE_COMMAND",
    "OpdConfig",
    "PdDpoConfig",
    "PecanConfig",
    "PRESETS",
    "PrimalDualConfig",
    "RepoConfig",
    "RunConfig",
    "SAMPLING",
    "SMOKE",
    "SacpoConfig",
    "SafeDpoConfig",
    "check",
    "fit",
    "hh_rlhf",
    "preset_named",
    "published",
    "safe_rlhf",
    "shown_name",
    "smoke",
    "was_by_preference",
    "with_steps",
    "without_epochs",
]
