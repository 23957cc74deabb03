"""What bench/serve_overhead.py compares the service with: a plain Serve app, and uvicorn alone."""
