"""QLoRA from beginning to end: a new skill for the 4-bit small model, then used with the trimmed cache."""
