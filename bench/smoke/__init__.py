"""What an owner of a node with the GPUs runs once: bench/smoke_trtllm.py.

probe.py      in the engine's environment: asks `tensorrt_llm` itself, over a prefix of layers
verdicts.py   what the probe's answers mean for the adapter
serving.py    the whole engine behind the adapter and worker that serve
lock.py       the environment, written down
"""
