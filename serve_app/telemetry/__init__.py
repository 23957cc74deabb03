"""Traces and metrics of requests. Prompts are never recorded."""
