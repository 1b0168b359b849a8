"""What a user calls SOURCE: a name, a folder, a list, an archive, Parquet or shards become `Images`.

This package owns the search for images, their labels and splits, and the caches beside them. It imports `data` and what
stands below it. Start with `open_source`.
"""
