"""Embedding files: one row per image with its path, label, feature vector and thumbnail.

This package writes embedding files and answers questions about them: nearest neighbors,
near-duplicates, clusters, outliers, and labels predicted from a few labels. It imports `runs` and
the packages listed before it. Start reading with `table` (the file) and `embed` (how it is
written).
"""
