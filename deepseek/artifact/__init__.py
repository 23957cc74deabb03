"""The quantized checkpoint (tensors, manifest, writer, reader), and the documents of an engine (its
manifest and verdict)."""
