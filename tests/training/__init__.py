"""Tests of the training loop and the data pipeline, on a toy objective."""
