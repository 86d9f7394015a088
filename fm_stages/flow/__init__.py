"""The mathematics of flow matching, without data and without Lightning."""

from fm_stages.flow.experts import Networks
from fm_stages.flow.generators import keyed_generator, keyed_normal, keyed_uniform, stratified_uniform
from fm_stages.flow.guidance import Guidance, guided, unguided
from fm_stages.flow.paths import CosinePath, LinearPath, Path, VPPath, check_time, expand_time
from fm_stages.flow.reshaped import (
    ResolutionShiftedTimesteps,
    ShiftedTimesteps,
    TruncatedTimesteps,
    shift_for_share,
)
from fm_stages.flow.sampling import SAME_IMAGE, count_evaluations, sample
from fm_stages.flow.sde import DIFFUSIONS, EulerMaruyama
from fm_stages.flow.solvers import (
    SAME_TIME,
    SOLVERS,
    Solver,
    Velocity,
    dopri5,
    euler,
    heun,
    integrate,
    midpoint,
    solver_named,
    stage_grid,
    time_grid,
)
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
    "DIFFUSIONS",
    "EulerMaruyama",
    "Guidance",
    "InverseErrorWeighting",
    "LearnedWeighting",
    "LinearPath",
    "LogitNormalTimesteps",
    "MinSNRWeighting",
    "ModeTimesteps",
    "Networks",
    "Path",
    "ResolutionShiftedTimesteps",
    "SAME_IMAGE",
    "SAME_TIME",
    "SOLVERS",
    "ShiftedTimesteps",
    "SigmaSqrtWeighting",
    "Solver",
    "StageWeighting",
    "TabulatedTimesteps",
    "TimestepSampler",
    "TruncatedTimesteps",
    "UniformTimesteps",
    "UniformWeighting",
    "VPPath",
    "Velocity",
    "Weighting",
    "check_time",
    "count_evaluations",
    "dopri5",
    "euler",
    "expand_time",
    "guided",
    "heun",
    "integrate",
    "keyed_generator",
    "keyed_normal",
    "keyed_uniform",
    "midpoint",
    "sample",
    "shift_for_share",
    "shift_time",
    "solver_named",
    "stage_grid",
    "stratified_uniform",
    "time_grid",
    "unguided",
    "weights_for_share",
]
