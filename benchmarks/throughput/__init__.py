"""Many requests at once: how many a second, and how long each waits."""
