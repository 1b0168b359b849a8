"""Atomic files, locks, process pools, confidence intervals and a progress bar.

This package owns what any program of this kind needs and knows nothing of images or models. It
imports only `simsiam.errors`. Each module has one purpose; start with `files`, which writes,
`read_files` and `typed_json`. What depends on the operating system is in `system`, what depends on
the device in `devices`.
"""
