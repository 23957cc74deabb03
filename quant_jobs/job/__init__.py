"""The quantize job: driver, the steps of one layer, the job folder, progress."""
