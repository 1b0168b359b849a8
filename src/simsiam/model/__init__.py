"""The network, the losses, the targets and the optimizers; `siamese` is the method itself.

This package owns everything that has weights or gradients. It imports `config` and `distributed`
and never sees where images come from. Start with `siamese`, then read `targets` and `losses`.
"""
