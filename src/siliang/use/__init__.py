"""A trained run at work: predict, generate, evaluate, chat, and merge."""
