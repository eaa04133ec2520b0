"""Many rows of pictures and questions: answered many at once, by an engine."""
