"""Files that appear whole or not at all, locks, process pools and a progress bar.

This package owns what any program of this kind needs and knows nothing of images or models. It imports only
`simsiam.errors`. Each module has one purpose; `files` is the one to read first.
"""
