"""What one forward does with a cache: hooks on the model, the turn that they open, the vision tower, encoded pictures."""
