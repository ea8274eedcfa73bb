"""Which method is best on one's own data: every method with every seed on one base model, as records."""
