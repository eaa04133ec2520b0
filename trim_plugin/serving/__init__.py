"""Requests of OpenAI's chat completions: checked before any work, and answered by transformers' own server."""
