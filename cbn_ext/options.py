"""The mode, and the options that everything below the public functions takes behind its tensors."""

import enum
from dataclasses import dataclass


class Mode(enum.IntEnum):
    """Who gives the responsibilities; the numbers are those of the native operators."""

    CHANNEL = 0  # a mixture for each channel
    GROUPS = 1  # each image's group
    JOINT = 2  # one mixture over the channels of a point


@dataclass(frozen=True, slots=True)
class Options:
    """The choices that forward and backward take."""

    mode: Mode
    training: bool  # normalise with the batch's statistics rather than the running ones
    relu: bool  # max(0, ·) of the sum of normalised x and residual
    detach_responsibility: bool  # treat the responsibilities as constants in the gradient
    eps: float  # ε, added to every variance
