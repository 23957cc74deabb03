"""The Ray Serve application: OpenAI's HTTP API in front, one engine per replica behind it.

    openai/      the HTTP API: routes, request bodies, streams, answers, tokenizer, the ingress
    routing/     admission checks; the client of the engine replicas
    gating.py    the door: which engine directory may be served
    replica/     the engine deployment: one engine, its messages and its heartbeats
    engines/     the engine protocol and its adapters
    telemetry/   spans and metrics: they wrap the steps of a request and decide nothing

The hops of a request, in order; events return the same way, and openai/answers.py writes them in
OpenAI's words:

    answer        openai/service.py           key, body and model; one recorded outcome
    admit         routing/checks.py           what can never be served is refused
    open_stream   openai/stream.py            every choice has its first event before the 200
    generate      routing/replica_client.py   Serve picks a replica: the actor hop
    generate      replica/replica.py          too many waiting is refused; one span per choice
    coalesce      replica/coalesce.py         events that are ready share a message
    generate      engines/embedded.py         from asyncio into the thread of the step loop
    step          deepseek/engine/engine.py   one step of the whole batch

serve_app imports deepseek and cluster, never quant_jobs: what it needs of a job is in the artifact.
"""
