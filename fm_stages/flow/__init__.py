"""The mathematics of flow matching, without data and without Lightning."""

from fm_stages.flow.generators import keyed_generator, keyed_normal, keyed_uniform, stratified_uniform
from fm_stages.flow.paths import CosinePath, LinearPath, Path, VPPath, check_time, expand_time
from fm_stages.flow.reshaped import (
    ResolutionShiftedTimesteps,
    ShiftedTimesteps,
    TruncatedTimesteps,
    shift_for_share,
)
from fm_stages.flow.sampling import sample
from fm_stages.flow.solvers import euler, time_grid
from fm_stages.flow.tabulated import TabulatedTimesteps
from fm_stages.flow.timesteps import (
    BetaTimesteps,
    LogitNormalTimesteps,
    ModeTimesteps,
    TimestepSampler,
    UniformTimesteps,
    shift_time,
)
from fm_stages.flow.uncertainty import LearnedWeighting
from fm_stages.flow.weighting import (
    CosMapWeighting,
    InverseErrorWeighting,
    MinSNRWeighting,
    SigmaSqrtWeighting,
    StageWeighting,
    UniformWeighting,
    Weighting,
    weights_for_share,
)

__all__ = [
    "BetaTimesteps",
    "CosMapWeighting",
    "CosinePath",
    "InverseErrorWeighting",
    "LearnedWeighting",
    "LinearPath",
    "LogitNormalTimesteps",
    "MinSNRWeighting",
    "ModeTimesteps",
    "Path",
    "ResolutionShiftedTimesteps",
    "ShiftedTimesteps",
    "SigmaSqrtWeighting",
    "StageWeighting",
    "TabulatedTimesteps",
    "TimestepSampler",
    "TruncatedTimesteps",
    "UniformTimesteps",
    "UniformWeighting",
    "VPPath",
    "Weighting",
    "check_time",
    "euler",
    "expand_time",
    "keyed_generator",
    "keyed_normal",
    "keyed_uniform",
    "sample",
    "shift_for_share",
    "shift_time",
    "stratified_uniform",
    "time_grid",
    "weights_for_share",
]
