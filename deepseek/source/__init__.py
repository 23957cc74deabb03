"""The source checkpoint: its reader, and synthetic checkpoints of the release's shapes."""
