"""What the project says about memory, speed and quality is measured here; a room a question, what they share in `common`."""
