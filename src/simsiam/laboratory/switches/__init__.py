"""The experiment `switches`: four switches of SimSiam, and what each does to a recorded run.

This package records runs while they train (`recording`), puts into words what turning a switch did
(`sentences`), and writes the interactive page (`page`). Start reading with `recording`.
"""
