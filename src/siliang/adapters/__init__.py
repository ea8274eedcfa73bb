"""Adapters on a base model: attached, activated, merged, saved and taken off again. What an adapter consists of is said
by its method (siliang.methods); this room puts it into the model's modules and reads and writes its files.
"""
