"""What belongs to requests under way."""
