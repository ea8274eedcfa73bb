"""The names of Hugging Face PEFT: `PeftModel`, and the functions beside it. Thin: adapters/ does the work."""
