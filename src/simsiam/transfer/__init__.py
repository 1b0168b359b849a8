"""Transfer (section 6.1, Table 5): detection and segmentation, fine-tuned end to end from a run's backbone."""
