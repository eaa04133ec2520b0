"""Knows pictures before and beside the text: from files to inputs, from kept tokens to images. Imports `generation` and below."""
