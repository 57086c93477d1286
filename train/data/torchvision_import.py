"""torchvision, imported when it is needed and with an error that says what to do."""

import importlib
from types import ModuleType

from train.errors import UserError


def import_torchvision(module: str) -> ModuleType:
    """The module ``torchvision.<module>``.

    Raises:
        UserError: torchvision is missing, or was built for another torch.
    """
    try:
        return importlib.import_module(f"torchvision.{module}")
    except (ImportError, RuntimeError) as error:
        # A CPU torchvision beside a CUDA torch (or of another version) fails on "operator torchvision::nms".
        raise UserError(
            f"torchvision cannot be imported ({error}). It must be of the same release and the same kind "
            f"(CPU or CUDA) as torch: install both in one command from one package index"
        ) from error
