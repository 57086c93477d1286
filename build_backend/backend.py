"""The PEP 517 backend: setuptools', building against the torch that is already installed.

Under build isolation setup.py cannot see the environment's torch, and torch as a fixed build requirement
makes pip fetch gigabytes, perhaps of another version than the one that will load the result. So the installed
torch is looked up and made importable, and one is asked for only where there is none. Each hook runs in a
process of its own, which imports this module anew.
"""

from setuptools.build_meta import *  # noqa: F403 - the hooks themselves

from build_backend import host_torch

_installed = host_torch.find()
if _installed is not None:
    host_torch.expose(_installed)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What a build needs beyond build-system.requires (setuptools' hook would run setup.py for it)."""
    return [] if _installed is not None else [host_torch.REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
