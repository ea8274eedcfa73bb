"""What tasks share that learn vectors or scores of texts that belong together."""
