"""Measurements during and after training.

This package owns functions that turn outputs or features into named numbers: the gauges of one
step, the verdict on a run, kNN accuracy, and signals that need no labels. None of them changes a
run. It imports `model`, `data` and the packages listed before them. Start with `gauges` and
`verdict`.
"""
