"""How much memory a generation takes, worked out from a model's configuration without its weights."""
