"""How well the small trained model answers with few visual tokens, rule by rule."""
