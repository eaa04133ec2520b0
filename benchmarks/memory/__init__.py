"""What is held in memory, and what a process needs at its peak."""
