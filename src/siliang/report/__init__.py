"""From records to what a person reads: a table, plots, one self-contained page. Never looks at a live run."""
