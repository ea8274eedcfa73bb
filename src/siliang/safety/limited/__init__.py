"""What runs in the process under limits (limits.py): others' chat templates, tokenizers' rules and patterns."""
