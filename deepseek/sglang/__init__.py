"""What SGLang loads for DeepSeek-V3 on GPUs, and a model of how it loads it.

    versions      the version of SGLang that engines are built for
    layout        the tensors of an engine directory, by name, from shapes alone
    loadable      what SGLang cannot load at all: formats, shapes, numbers of ranks
    quant_config  `quantization_config` of config.json
    fields        what engine.json says beyond the common part
    launch        sglang.yaml, the arguments of `sglang.launch_server`: made, written and read
    loader*       a model of the loader: what each rank reads and holds; decoded and compared
    check         what the loader takes in silence, refused (`build --check`)
    stored_model  a built directory read back with the values that SGLang computes with

`quant_jobs/targets/sglang.py` builds the directory. Nothing here needs a GPU or sglang.
"""
