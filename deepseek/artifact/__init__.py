"""The quantized checkpoint and what is bound to it: tensors, manifest, writer, reader, verdict."""
