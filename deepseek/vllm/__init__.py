"""What vLLM loads for DeepSeek-V3 on GPUs, and a model of how it loads it.

    versions      the version of vLLM that engines are built for
    layout        the tensors of an engine directory, by name, from shapes alone
    loadable      what vLLM cannot load at all: formats, shapes, numbers of ranks
    quant_config  `quantization_config` of config.json
    fields        what engine.json says beyond the common part
    launch        vllm.yaml, the arguments of `vllm serve`: made from the plan, written and read
    loader*       a model of the loader: what each rank reads and holds; decoded and compared
    check         what the loader takes in silence, refused (`build --check`)
    stored_model  a built directory read back with the values that vLLM computes with

`quant_jobs/targets/vllm.py` builds the directory. Nothing here needs a GPU or vllm.
"""
