"""The embedded engine: DeepSeek-V3 on a CPU, quantized or not, in continuous batches.

    options.py     how an engine runs, what it serves, how busy it is
    request.py     requests, step outputs, sequences
    limits.py      what a request must fulfill             tracked.py   a request under way
    scheduler.py   which tokens run next (no tensors)      pages.py     who uses which KV page
    prefix.py      which pages hold which beginnings       runner.py    a step's tensors
    batch.py       the tokens of one step as tensors       kv_cache.py  the paged latent cache
    native.py      whether the compiled kernels compute: deepseek/native
    native_model.py  the forward pass with them            native_attention.py  attention alone
    model.py       the same with PyTorch's: attention.py, moe.py, rope.py
    arithmetic.py  what is rounded where: as the engine itself, or as a target
    linear.py      PyTorch's kernels, one class per weight format
    emulated.py    linears that round as a target's kernels do (target_inputs.py: their inputs)
    sampler.py     logits -> tokens                        detokenizer.py  tokens -> text
    prompt_scores.py  logprobs of a prompt                 logprob_names.py  and their texts
    engine.py      the step loop over all of these         opening.py   what an engine is made of

    packed_layout.py  which tensors an engine holds, and their bytes, from config and schemes
    packing.py        source or artifact -> those tensors
    native_layout.py  how they lie for the compiled kernels  torch_layout.py  and for PyTorch's
    weights.py        the tensors on their way into a model
    packed.py         the engine directory: manifest fields, verified loading

quant_jobs/targets/embedded.py writes engine directories. Nothing here knows of Ray, HTTP or
asyncio; serve_app/engines/embedded.py runs the step loop in a thread.
"""
