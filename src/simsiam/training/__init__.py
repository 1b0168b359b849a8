"""The training loop, and pretraining on it.

This package owns preparing a run, the training step, the loop with its signals and progress line,
and the verbs that run training steps to measure them (`inspect`, `plan`). It imports
every package listed before it. Start with `pretrain`, then `loop`.
"""
