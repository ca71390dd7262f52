"""Cycles and memory that Arm's compiler Vela estimates for int8 networks, as a reference for our own estimates."""
