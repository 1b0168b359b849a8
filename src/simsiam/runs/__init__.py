"""The run folder, and everything that reads or writes one.

This package owns the files of a run (recipe, checkpoints, weights, metrics) and the checkpoints of
other programs. It trains nothing. It imports `monitoring`, `sources` and the packages listed
before them. Start with `run_folder`.
"""
