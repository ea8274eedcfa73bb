"""From the user's file to what the model sees: sources, examples, templates, tokens, batches."""
