"""Directories as IntServe 0.1.0 wrote them: an engine before engine.json had format 2, and an
artifact before intserve.json had."""

from __future__ import annotations

import json
from pathlib import Path

from support.quantizing import SmallModel, add_text
from support.synthetic import quantize_plainly, write_checkpoint

from deepseek.artifact.compressed_tensors import quantization_config
from deepseek.artifact.reader import ArtifactReader
from deepseek.files import json_bytes
from deepseek.recipe import Recipe

#: The intserve.json of the artifact of `write_format_1_artifact`, byte for byte.
_ARTIFACT = Path(__file__).with_name("format_1_artifact.json")
#: What it calls itself.
ARTIFACT_DIGEST = "81395cea76daf01b2ab8a752b076f7abe673b40a41ad6963a65a0e58e5507104"

#: The engine.json of an unquantized source, of which two linears and two tensors are left.
_ENGINE = {
    "artifact_digest": "37efaf0543e5362f6425fed76b9d4e2035d4ad3dc6ff6632ea5807d95d206897",
    "cpu_layout": None,
    "digest": "f4dd9fa6072a5d5d14aa665df0829afc7452c36b19d9c38346769939fa8e0227",
    "dtype": "float32",
    "files": {
        "config.json": "b7908db991dede18d5ccf8d0affeb426674770493a202cd044b263b39995f36e",
        "tokenizer.json": "16fb4d1c5c3b5c13a812e7fd89797731db1ae3751e584aaa4d439beff5027c21",
        "tokenizer_config.json": "779836ad0436a5abfff5696442445028acd3e09631540e3e40e73b986deb9cf1",
    },
    "format_version": 1,
    "kv_cache": "bf16",
    "mtp": "skipped",
    "page_tokens": 16,
    "recipe": "unquantized",
    "schemes": {
        "model.layers.0.mlp.down_proj": {"weights": "fp8-block"},
        "model.layers.0.mlp.gate_proj": {"weights": "fp8-block"},
    },
    "source_fingerprint": "37efaf0543e5362f6425fed76b9d4e2035d4ad3dc6ff6632ea5807d95d206897",
    "target": "embedded",
    "tensor_file": {
        "header_sha256": "efbfad99655275cc38a4e3622f339889dae328053087a8305538b5579d7e26ac",
        "num_bytes": 28915712,
        "sha256": "87c9831ef6463b4e62aed1e858fc65b6119ba42f55266588bc7ece8553dc97de",
        "tensors": {
            "lm_head.weight": "1f9768e471bc5798da343b8fa64ce03a",
            "model.embed_tokens.weight": "8071b52e21375f079231a520bfaaed67",
        },
    },
    "tools": {"intserve": "0.1.0", "torch": "2.13.0+cpu"},
    "tp": 1,
}


def write_format_1_engine(directory: Path) -> None:
    """Write engine.json of format 1; its readers refuse it before they look at other files."""
    directory.mkdir(exist_ok=True)
    (directory / "engine.json").write_text(json.dumps(_ENGINE, indent=2, sort_keys=True) + "\n")


def give_older_config(artifact: Path, *, form: int) -> None:
    """Give an artifact the config.json that belongs to a manifest of an older form."""
    reader = ArtifactReader(artifact)
    path = artifact / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] = quantization_config(reader.config, reader.schemes, form=form)
    path.write_bytes(json_bytes(content))


def write_format_1_artifact(root: Path) -> tuple[Path, SmallModel]:
    """ROOT/artifact, an `int4` artifact by plain rounding whose manifest has format 1, and the
    model that it was made from. Tensor files have the bytes that they had then, so they are made
    here; readers verify them."""
    write_checkpoint(
        root / "model",
        layers=2,
        experts=4,
        hidden=128,
        intermediate_size=128,
        num_nextn_predict_layers=0,
    )
    model = add_text(root / "model", root / "text.txt")
    recipe = Recipe.model_validate(json.loads(_ARTIFACT.read_text())["recipe"])
    quantize_plainly(model.directory, recipe, root / "artifact")
    give_older_config(root / "artifact", form=1)
    (root / "artifact" / "intserve.json").write_bytes(_ARTIFACT.read_bytes())
    return root / "artifact", model
