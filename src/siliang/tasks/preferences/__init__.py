"""What tasks share that learn which answer is better."""
