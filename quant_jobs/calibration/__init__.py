"""What enters every linear of a layer, measured on calibration blocks."""
