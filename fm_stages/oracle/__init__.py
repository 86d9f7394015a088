"""The heart: the bank, the exact posterior over it, and what the oracle says about a model."""

from fm_stages.oracle.bank import DataBank, count_columns
from fm_stages.oracle.curves import Curves, TimestepCurves, timestep_bins
from fm_stages.oracle.decompose import Decomposition, decompose, mean_square
from fm_stages.oracle.estimators import (
    ClassBanks,
    SharedBatchOracle,
    SubsetBank,
    SubsetOracle,
    TemperedOracle,
)
from fm_stages.oracle.exact import Oracle, Posterior
from fm_stages.oracle.mixture import MixtureOracle, oracle_of
from fm_stages.oracle.mixture_bank import GaussianMixtureBank, moments_affine
from fm_stages.oracle.neighbours import largest_weights, nearest_rows
from fm_stages.oracle.plan import BankPlan, describe, nearest_pays, plan_bank, rows_per_query
from fm_stages.oracle.profile import THRESHOLDS, StageCurves, StageProfile
from fm_stages.oracle.ranks import gather_objects, together
from fm_stages.oracle.skipping import measure_nearest
from fm_stages.oracle.stored_rows import RowReader
from fm_stages.oracle.wiener import Wiener, linear_reference

__all__ = [
    "THRESHOLDS",
    "BankPlan",
    "ClassBanks",
    "Curves",
    "DataBank",
    "Decomposition",
    "GaussianMixtureBank",
    "MixtureOracle",
    "Oracle",
    "Posterior",
    "RowReader",
    "SharedBatchOracle",
    "StageCurves",
    "StageProfile",
    "SubsetBank",
    "SubsetOracle",
    "TemperedOracle",
    "TimestepCurves",
    "Wiener",
    "count_columns",
    "decompose",
    "describe",
    "gather_objects",
    "largest_weights",
    "linear_reference",
    "mean_square",
    "measure_nearest",
    "moments_affine",
    "nearest_pays",
    "nearest_rows",
    "oracle_of",
    "plan_bank",
    "rows_per_query",
    "timestep_bins",
    "together",
]
