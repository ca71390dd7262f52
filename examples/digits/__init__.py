"""Handwritten digits, 8×8, from scikit-learn: how to bring a model and data of one's own."""
