"""What determines a run, as plain data: methods, recipes, and the settings of the protocols.

This package owns every setting with its default, its help and its source in the paper. It imports
`errors` and `utils`, and loads no torch. Start with `method` (what a method consists of), then
`methods` (the rows of Figure 3), then `recipes`.
"""
