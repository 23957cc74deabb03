"""What bench/peers_decode.py and bench/served_decode.py are made of.

ds3.py         the model of both: 706 M parameters, random weights, and our engines of it
vocabulary.py  its tokenizer
llama.py       llama.cpp from the source that its Python package brings, and ds3 as GGUF;
               llama_convert.py and llama_quantize.py are the steps that need its code
workers.py     a contender in a process of its own, and what it is asked; lines.py is its side,
               ours_worker.py, llama_worker.py and transformers_worker.py are the contenders'
contenders.py  who takes part and how each is opened
rounds.py      the measurement: who is asked what, in which order
traffic.py     bytes that a step must read
ceilings.py    what the machine can do at best; ceilings.c is its read of memory
alone_worker.py  the engine under a closed loop of requests, beside the service
growth.py      step time against batch and context
report.py      the tables; plot.py the picture
"""
