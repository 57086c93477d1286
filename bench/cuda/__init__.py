"""The benchmark of the layers on a GPU, in graph replay: plan, measurement, tables and report."""
