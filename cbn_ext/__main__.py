"""``python -m cbn_ext`` prints what is installed and what of it works."""

from cbn_ext import build_info

for name, value in build_info().items():
    print(f"{name:<16} {', '.join(value) if isinstance(value, list) else value}")
