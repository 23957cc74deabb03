"""The adapter of engines that run in a process and a Python environment of their own.

    engine.py    implements the engine protocol: requests, load, health, the end
    text.py      text, stops, limits, counts and phases of one request, from token ids alone
    process.py   the worker's processes: started, watched, killed
    channel.py   the adapter's end of the socket
    launch.py    how a worker is started, and how long things may take
    options.py   which file here plans which kind of engine
    trtllm.py    what TensorRT-LLM is started with, checked before it starts
    vllm.py      what vLLM is started with, likewise
    loading.py   from the start of the process until the engine is ready
    health.py    pings, canaries and stalls: when an engine is given up

The worker itself is `serve_app/engines/worker`. What is particular to one engine is in the files of
its name, one here and one there.
"""
