"""OpenAI's HTTP API: routes, requests, answers, streams, tokenizer."""
