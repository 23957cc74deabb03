"""The Ray Serve application: OpenAI HTTP in front, one engine per replica behind.

    HTTP -> ingress.py (parse, admit) -> client.py (actor hop) -> replica.py -> engines/*
         <- stream.py (one path for streamed and whole answers) <- formats.py (OpenAI's words)

Spans and metrics (telemetry.py, metrics.py) wrap these steps; they never interleave with them.
It imports deepseek and cluster, never quant_jobs: what it needs of a job is in the artifact.
"""
