"""The command line: one module for each verb, with its flags, its help and one call.

This package owns parsing arguments, printing results and exit codes. It imports everything, but only when a verb runs.
Start with `main`.
"""
