"""The one training loop, and pretraining on it.

This package owns preparing a run, the step, the loop with its signals and progress line, and the verbs that measure
steps (`inspect`, `plan`). It imports everything below it. Start with `pretrain`, then `loop`.
"""
