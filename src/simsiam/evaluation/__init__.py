"""The protocols that measure a backbone: kNN, linear, few labels, fine-tuning and label-free signals.

This package owns how each number is obtained and how it is labeled. It imports `training` for the loop, and what stands
below it. Start with `evaluate`; each protocol is one module.
"""
