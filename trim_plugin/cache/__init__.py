"""What a generation holds: the cache, its layers, the record of their visual tokens, and what moves a batch."""
