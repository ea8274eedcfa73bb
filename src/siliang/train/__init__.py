"""Trains: a config in, a run folder with its record out."""
