"""What happens when things go wrong: processes killed, disks full, files damaged, losses that are not finite, hostile
input.

Each part causes these failures for real, many times, and counts the results; `make faults` prints the counts. The short
forms are in tests/faults.
"""
