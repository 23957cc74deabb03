"""What transformers' `from_pretrained` loads for DeepSeek-V3, and a model of how it loads it.

    layout        the tensors of a directory, by name, from shapes alone, and what becomes of each
                  linear of a recipe
    loadable      what it cannot load at all, and what an artifact says that it would not read
    quant_config  quantization_config of config.json, in the words that its quantizers look up
    launch        from_pretrained.json: the keyword arguments
    fields        what engine.json says beyond the common part
    loader        a model of the loader: which keys it reads, what the parameters hold
    check         what it would refuse, warn of or take in silence, refused (`build --check`)
    stored_model  the directory as the model that transformers computes with
    versions      the versions that this was read in

`quant_jobs/targets/transformers.py` builds the directory. Nothing here needs transformers.
"""
