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
    """What is computed.

    Attributes:
        mode: who gives the responsibilities.
        training: normalise with the batch's statistics rather than the running ones.
        relu: max(0, ·) of the normalised x and the residual.
        detach_responsibility: treat the responsibilities as constants in the gradient.
        eps: ε, added to every variance.
    """

    mode: Mode
    training: bool
    relu: bool
    detach_responsibility: bool
    eps: float
