"""Measuring an engine against its source: scores, decode speed, sizes, the recipe's limits, and the
record of the results."""
