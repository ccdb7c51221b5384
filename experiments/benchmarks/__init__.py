"""Measurements as ratios, all sides in one run: `python -m experiments.benchmarks` for speed, `.weights` for files."""
