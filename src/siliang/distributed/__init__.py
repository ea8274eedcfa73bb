"""One training on several devices: its processes, their exchange, and how they are started."""
