"""Flax networks: one file, one network. Pure functions of (params, inputs)."""
