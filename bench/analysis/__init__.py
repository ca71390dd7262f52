"""Time of the analysis, beside others' tools that answer the same question: ``python -m bench.analysis``."""
