"""What the benchmarks share: scenarios, models, decoding, files and tables. Knows none of the rooms that measure."""
