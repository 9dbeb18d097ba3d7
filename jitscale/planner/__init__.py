"""What a run costs, counted from shapes: memory, communication and time, and which settings to choose."""
