"""Weights in and out of PyTorch layouts."""
