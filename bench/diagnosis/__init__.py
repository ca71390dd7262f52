"""Faults planted in trained networks, and whether the pipeline names each of them: ``python -m bench.diagnosis``."""
