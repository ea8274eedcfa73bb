"""Counts bytes: what a run really used."""
