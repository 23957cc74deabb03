"""The quantization algorithms: functions of tensors. No files, no processes, no layers."""
