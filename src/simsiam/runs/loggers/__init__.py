"""Loggers: TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl.

This package owns what is sent to them, and the rule that no logger stops or ends a run. It imports
`utils` and `errors`, and the run folder. Start with `loggers`, then `background`.
"""
