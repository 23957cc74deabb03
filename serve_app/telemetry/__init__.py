"""Traces and metrics of requests; they decide nothing. Prompts are never recorded."""
