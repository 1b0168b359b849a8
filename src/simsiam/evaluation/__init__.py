"""The protocols that measure a backbone: kNN, linear, few labels, fine-tuning, label-free signals.

This package owns how each number is obtained and what its record says. It imports `training` for
the loop, and the packages listed before it. Start reading with `evaluate`. Each protocol is one
module, `protocol_NAME.py`, which defines `evaluate_frozen(frozen, settings)`; to add a protocol,
add such a module.
"""
