"""Rows of an image as time steps: a GRU or LSTM on Fashion-MNIST."""
