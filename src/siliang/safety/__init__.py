"""What others have written, read and run within limits: JSON, YAML, patterns, templates, tokenizers, and Python code by
permission alone."""
