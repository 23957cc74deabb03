"""HTML pages and JSON files about a job and about an engine."""
