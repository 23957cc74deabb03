"""Input statistics of a layer's linears over calibration blocks, and the units of its work."""
