"""Adapters on a base model: attached, activated, merged, saved and removed. What an adapter consists of is defined
by its method (siliang.methods); this package puts it into the model's modules and reads and writes its files.
"""
