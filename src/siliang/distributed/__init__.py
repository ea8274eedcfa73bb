"""One training on several devices: its processes, what they tell each other, and how they are started."""
