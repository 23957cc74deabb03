"""`from_pretrained.json`: the keyword arguments of transformers' `from_pretrained` for a directory.

    AutoModelForCausalLM.from_pretrained(DIR, **json.load(open("DIR/from_pretrained.json")))

That the weights are dequantized stands in config.json (`quant_config.py`).
"""

from __future__ import annotations

from typing import Any

from deepseek.errors import DeployError
from deepseek.files import json_bytes
from deepseek.untrusted import UnusableFileError, parse_json_object, show, show_name

LAUNCH_FILE = "from_pretrained.json"

#: BF16, because it is what a verdict is about: FP32 is four bytes for every weight, and with FP8
#: tiles transformers leaves norms and embeddings in BF16 beside FP32 linears, and stops when it
#: computes. No code of the checkpoint is run.
_ARGUMENTS: dict[str, Any] = {"dtype": "bfloat16", "trust_remote_code": False}
#: What a user may add without changing what is computed.
_FREE = ("attn_implementation", "device_map", "max_memory", "offload_folder", "tp_plan")


def launch_bytes() -> bytes:
    """The file's content."""
    return json_bytes(_ARGUMENTS)


def check_launch(data: bytes, *, where: str) -> None:
    """Check the arguments of a directory.

    Raises:
        DeployError: they are no JSON object, or ask for another computation than was built.
    """
    try:
        given = parse_json_object(data)
    except UnusableFileError as error:
        raise DeployError(f"{where} {error}; build again") from error
    for name in sorted(given.keys() | _ARGUMENTS.keys()):
        if name in _FREE:
            continue
        if name not in _ARGUMENTS:
            raise DeployError(
                f"{where} has {show_name(name)}, which would change what is loaded; remove it"
            )
        if given.get(name) != _ARGUMENTS[name]:
            raise DeployError(
                f"{where} has {name} {show(given.get(name))}, and the directory was built for "
                f"{show(_ARGUMENTS[name])}; build again"
            )
