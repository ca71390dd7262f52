"""Which modules are worth 16 bits: a search over formats, accuracy against simulated latency.

``space`` has the formats that there are to choose from, ``front`` chooses by an exact integer program, ``attempts``
compiles and scores a choice, ``search`` spends the time, ``edit`` writes a choice into ``params.yaml``.
"""
