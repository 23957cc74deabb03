"""The workers of a quantize job, on Ray or in the driver's process, and their messages."""
