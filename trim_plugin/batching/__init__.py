"""Many rows of pictures and questions: answered in batches, kept in a file that a stopped run goes on with."""
