"""The parts of a loader model that engines which fuse linears share: vLLM, and SGLang, whose loader
descends from vLLM's.

    groups        which config group a module is in, and what scheme that is
    modules       a rank's linears, experts and plain tensors, and the parameters that each has
    rank_modules  which of them a rank has, layer by layer
    fill          how one tensor of the checkpoint is copied into a parameter
    loader        the loader over one directory, rank by rank
    loading       what a loader would take in silence is refused
    decode        the parameters of a rank decoded and compared with the artifact

The room of an engine says what it does otherwise (names of fused modules, which experts a rank
holds, what it refuses, how it pads) and which source it is modeled after. Like the rest of a
loader model this is independent of what builds our directories.
"""
