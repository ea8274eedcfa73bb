"""The code of the limited process (limits.py): untrusted chat templates, tokenizer rules and patterns."""
