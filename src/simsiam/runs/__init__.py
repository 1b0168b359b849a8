"""The run folder, and everything that reads or writes one: recipes, checkpoints, weights, journals.

This package owns the files of a run and the formats of other programs' checkpoints. It imports `sources`, `monitoring`
and what stands below them, and trains nothing. Start with `run_folder`.
"""
