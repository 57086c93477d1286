"""Compound batch normalization for PyTorch: a Gaussian mixture in place of one mean and variance."""

from . import ops, reference
from ._extension import build_info, use_backend
from ._version import __version__
from .convert import convert_compound_batchnorm
from .functional import compound_batch_norm, split_batch_norm
from .modules import (
    CompoundBatchNorm1d,
    CompoundBatchNorm2d,
    CompoundBatchNorm3d,
    CompoundBatchNormAct1d,
    CompoundBatchNormAct2d,
    CompoundBatchNormAct3d,
)
from .options import Mode, Options
from .split import class_groups, split_path

__all__ = [
    "CompoundBatchNorm1d",
    "CompoundBatchNorm2d",
    "CompoundBatchNorm3d",
    "CompoundBatchNormAct1d",
    "CompoundBatchNormAct2d",
    "CompoundBatchNormAct3d",
    "Mode",
    "Options",
    "__version__",
    "build_info",
    "class_groups",
    "compound_batch_norm",
    "convert_compound_batchnorm",
    "ops",
    "reference",
    "split_batch_norm",
    "split_path",
    "use_backend",
]
