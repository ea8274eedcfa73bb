"""Reads and runs untrusted input within limits: JSON, YAML, patterns, templates, tokenizers; Python code only by
permission."""
