"""Benchmarks of the compound layers against nn.BatchNorm2d and the plain formula: `python -m bench`."""
