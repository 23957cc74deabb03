"""The worker: runs in the Python environment of an engine (TensorRT-LLM, vLLM) and imports it.

    __main__.py   starts the guardians, and below them the worker
    guardian.py   ends every process below it when the worker or the replica ends
    messages.py   what the replica's process and the worker say to each other
    channel.py    how they say it: length-prefixed frames on a Unix socket
    backend.py    what one engine must offer the loop; `trtllm.py` and `vllm.py` are one each
    loop.py       the one event loop: requests, aborts, pings, load, the end
    processes.py  the processes below one: which there are, which died
    loading.py    what is told while an engine loads: bytes read, ranks that died

Nothing else imports an engine. That environment has neither this project nor its packages: what is
here imports the standard library, msgspec and each other, relatively, and a backend imports its
engine; `tests/test_house.py` keeps that. The process is started from the file `__main__.py`, and
not from the folder, so that no file here hides a package of the same name.
"""
