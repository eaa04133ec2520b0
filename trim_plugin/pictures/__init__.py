"""Pictures outside of a forward: they are opened, written into prompts, encoded and saved; kept tokens are drawn."""
