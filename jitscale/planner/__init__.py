"""The cost of a run, counted from shapes (memory, communication, time), and recommended settings."""
