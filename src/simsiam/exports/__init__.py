"""A run's backbone for other programs, verified by loading it again.

This package owns the export formats, the conversion to detectron2's names and the model card. It imports `runs` and what
stands below it. Start with `export`.
"""
