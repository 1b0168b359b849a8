"""From what a user gives as SOURCE to `Images`: a name, a folder, a list, an archive or shards.

This package owns the search for images, their labels and splits, and the caches of what was found.
It imports `data` and the packages that `data` imports. Start with `open_source`.
"""
