"""Adapting to a source: the verb `adapt`, which compares encoders in closed form and trains on top.

It imports the one training step and whatever stands below `training`. Start reading in
`adapt.py`; how candidates are measured and compared is in `simsiam.monitoring.candidates`.
"""
