"""Several processes that make one run: process group, collectives, synchronized batch norm.

This package owns all communication between processes. In a single process every function returns
its input unchanged. It imports `errors`, `utils` and `config`. Start with `process_group`.
"""
