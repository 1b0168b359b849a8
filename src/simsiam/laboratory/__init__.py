"""The experiments of the paper, one for each table and figure; the demo and the benchmark.

This package owns the cells to run, the claims to test and the pages that are written. It may import
every package except `commands`. Start reading with `experiments`, then `reproduce`.
"""
