"""The experiments of the paper, one for each table and figure; the demo and the benchmark.

This package owns the cells to run, the claims that are tested and the pages that result. It imports everything below it.
Start with `experiments`, then `reproduce`.
"""
