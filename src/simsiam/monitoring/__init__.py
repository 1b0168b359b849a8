"""Measurements during and after training: gauges of one step, the verdict, kNN and label-free signals.

This package owns functions from outputs or features to named numbers; none of them changes a run. It imports `data` and
`model`. Start with `gauges` and `verdict`.
"""
