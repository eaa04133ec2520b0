"""Knows what is kept: processors choose, selection unites their choices. Imports `attention`."""
