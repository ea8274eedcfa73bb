"""Trains: a config in, a run folder with its record out."""

from siliang.callable_packages import make_callable

make_callable(__name__)
