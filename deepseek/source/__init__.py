"""The release: its checkpoint, read strictly and streamed, and synthetic ones of its shapes."""
