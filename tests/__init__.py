"""Tests: pytest, and python -m tests.golden_check DIR."""
