"""The Ray Serve application: OpenAI's HTTP API in front, one engine per replica behind it.

    openai/      the HTTP API: routes, request bodies, streams, answers, tokenizer, the ingress
    routing/     admission checks; the client of the engine replicas
    replica/     the engine deployment: the gate, the engine's owner, messages per second
    engines/     the engine protocol and its adapters
    telemetry/   spans and metrics: they wrap the steps of a request and decide nothing

    HTTP -> openai/routes.py -> routing/checks.py -> openai/stream.py -> routing/replica_client.py
         -> actor hop -> replica/replica.py -> engines/*.py; events return the same way,
            and openai/answers.py writes them in OpenAI's words

It imports deepseek and cluster, never quant_jobs: what it needs of a job is in the artifact.
"""
