"""Transfer to object detection and instance segmentation (section 6.1).

This package owns annotations, the detector, its training and its metrics. It imports `training`,
`exports` and the packages listed before them. Start reading with `transfer`.
"""
