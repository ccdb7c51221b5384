"""Configurations: python -m experiments.train --config=configs/NAME.py:variant."""
