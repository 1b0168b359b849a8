"""Checkpoints of other programs and published weights, made into run folders.

This package owns the names of published weights, the layouts of other programs, and `convert`. It
imports the run folder and the packages below `runs`. Start with `convert`.
"""
