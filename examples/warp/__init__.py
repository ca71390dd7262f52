"""Rotated, scaled and shifted Fashion-MNIST, straightened inside the network by a spatial transformer."""
