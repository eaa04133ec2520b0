"""Where transformers' `generate` meets the trimmed cache: registration, checks, micro-batches, assisted decoding."""
