"""Measures the memory that a run uses, in bytes."""
