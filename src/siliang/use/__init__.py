"""Using a trained run: predict, generate, evaluate, chat, and merge."""
