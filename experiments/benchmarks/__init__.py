"""Measurements as ratios, all sides in one run: python -m experiments.benchmarks.NAME."""
