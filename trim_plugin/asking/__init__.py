"""Asking about pictures: a row, what `generate` gets of it, what comes back, and where that is kept.

Commands, batches, evaluations and servers share it.
"""
