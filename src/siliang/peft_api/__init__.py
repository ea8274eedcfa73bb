"""The names of Hugging Face PEFT: `PeftModel` and functions. Thin: adapters/ does the work."""
