"""One row per image: path, label, feature vector and thumbnail; and the questions asked of such a file.

This package owns the embedding file and search, duplicates, clusters, outliers and label probes on it. It imports
`runs` and what stands below it. Start with `table` and `embed`.
"""
