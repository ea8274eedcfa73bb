"""What happens when things go wrong: processes killed, disks full, files damaged, losses that are not finite, hostile
input.

Each part does it for real, many times over, and counts what came of it; `make faults` prints the counts. The short
forms are in tests/faults.
"""
