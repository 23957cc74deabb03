"""What TensorRT-LLM's PyTorch backend loads for DeepSeek on Hopper, and a model of how it loads it.

    layout        the tensors of an engine directory, by name, from shapes alone
    loadable      what TensorRT-LLM cannot load at all: formats, dialects, numbers of ranks
    quant_config  hf_quant_config.json and quant_cfg.json, with the names that the loader looks up
    input_scales  static FP8 input scales that survive the loader's own rounding
    fields        what engine.json says beyond the common part
    loader*       a model of the loader: what each rank reads and holds; decoded and compared
    check*        what the loader takes in silence, refused (`build --check`)
    versions      the versions of TensorRT-LLM, and how each of their arguments is known
    llm_args      llm_args.yaml: chosen from the plan, written and read; llm_schema is its mirror
    lint          arguments that are known to hang, crash, answer wrongly or be ignored

`quant_jobs/targets/trtllm.py` builds the directory. Nothing here needs a GPU or tensorrt_llm.
"""
