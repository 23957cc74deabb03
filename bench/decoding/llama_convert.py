"""llama.cpp's converter for a model whose tokenizer it does not know.

    python llama_convert.py CHECKPOINT --outfile FILE --outtype f16

The converter recognizes a BPE tokenizer by a hash of what it makes of a text, to learn how that
tokenizer splits words before it merges. ds3's is nobody's, so "gpt-2" is said: only prompts that
are given as text depend on it, and the benches give token ids. llama.cpp's tree must be on the
path, and this folder must not (`python -P`): names in it are those of others there.
"""

from __future__ import annotations

import importlib


def main() -> None:
    converter = importlib.import_module("convert_hf_to_gguf")  # it puts gguf-py on the path
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda model, tokenizer: "gpt-2"
    converter.main()


if __name__ == "__main__":
    main()
