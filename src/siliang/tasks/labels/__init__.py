"""What tasks share that learn labels or numbers of whole rows."""
