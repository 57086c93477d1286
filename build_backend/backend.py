"""The PEP 517 backend: setuptools', building against the torch that is already installed.

Under build isolation setup.py cannot see the environment's torch, and torch as a fixed build requirement
makes pip fetch gigabytes, perhaps of another version than the one that will load the result. So the installed
torch is looked up and made importable, and one is asked for only where there is none. Each hook runs in a
process of its own, which imports this module anew.
"""

from importlib.util import find_spec

import setuptools
from setuptools.build_meta import *  # noqa: F403 - the hooks themselves

from build_backend import host_torch

# Without isolation nobody installs build-system.requires; what is missing would show as an error far from its cause.
if find_spec("pybind11") is None or not (find_spec("setuptools.command.bdist_wheel") or find_spec("wheel")):
    raise SystemExit(
        "cbn_ext: a build without isolation needs the build requirements in the environment: "
        "pip install 'setuptools>=77.0.3,<82' ninja pybind11. "
        f"Got setuptools {setuptools.__version__}, pybind11 {'found' if find_spec('pybind11') else 'missing'}."
    )

_installed = host_torch.find()
if _installed is not None:
    host_torch.expose(_installed)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What a build needs beyond build-system.requires (setuptools' hook would run setup.py for it)."""
    return [] if _installed is not None else [host_torch.REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
