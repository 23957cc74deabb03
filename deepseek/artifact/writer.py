"""Writes the quantized checkpoint: a compressed-tensors directory with a manifest.

    config.json                     the source's, with compressed-tensors' quantization_config
    model-layer-00000.safetensors   one file per decoder layer, MTP layers included
    model-globals.safetensors       embeddings, final norm, head
    model.safetensors.index.json    for loaders that are not ours
    tokenizer files                 copied
    intserve.json                   the manifest (deepseek/artifact/manifest.py); written last

`quantize` writes it: any process may publish a file, and one process finishes. The presence of
intserve.json means that the artifact is complete. `reader.py` reads it back and verifies it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deepseek.artifact.compressed_tensors import quantization_config
from deepseek.artifact.manifest import (
    MANIFEST_FILE,
    CalibrationRecord,
    Fallback,
    LayerKey,
    LayerRecord,
    Manifest,
    SourceRecord,
    read_manifest,
    write_manifest,
)
from deepseek.artifact.tensors import expected_tensors, layer_file, layer_keys, mismatch
from deepseek.errors import ArtifactError
from deepseek.files import remove_scraps, sha256_file, write_atomic, write_json
from deepseek.recipe import Recipe
from deepseek.source.checkpoint import INDEX_FILE, CheckpointReader
from deepseek.tensor_files import read_header, save_tensors

#: Files that are copied from the source where it has them. No code is ever copied.
COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

#: Keys of the source's config.json that would be untrue of, or harmful in, the artifact.
_DROPPED_KEYS = ("auto_map", "_name_or_path", "quantization_config")


class ArtifactWriter:
    """Writes one quantized checkpoint file by file; each file is whole or absent.

    Several processes may each have a writer for the directory and publish files. The process that
    finishes registers the files of the others (`register`). The caller keeps two jobs out of one
    directory; the writer refuses a directory that holds another job's result.

    Raises on opening:
        ArtifactError: the directory belongs to another recipe, source or tool.
        RecipeError: the recipe does not fit the model.
    """

    def __init__(self, directory: Path | str, *, source: CheckpointReader, recipe: Recipe) -> None:
        self.directory = Path(directory)
        self.recipe = recipe
        self.config = source.config
        self.schemes = recipe.resolve(source.config)
        self._source_dir = source.directory
        self._source = SourceRecord(
            fingerprint=source.fingerprint,
            config_sha256=sha256_file(source.directory / "config.json"),
            weight_block_size=source.config.weight_block_size,
        )
        self._records: dict[LayerKey, LayerRecord] = {}
        self._refuse_foreign_directory()
        self.directory.mkdir(parents=True, exist_ok=True)

    def publish_layer(
        self,
        layer: LayerKey,
        tensors: Mapping[str, Tensor],
        *,
        source_sha256: str,
        errors: Mapping[str, float] | None = None,
    ) -> LayerRecord:
        """Write the file of one layer (or of the globals) atomically; register and return its
        record.

        `tensors` must be exactly `expected_tensors`; a difference is a bug of the caller.
        `source_sha256` is `content_digest` of the source tensors that the file was made from;
        `errors` is the relative output error by module, see `LayerRecord`.
        """
        actual = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        difference = mismatch(actual, expected_tensors(self.config, self.schemes, layer))
        assert difference is None, f"layer {layer}: {difference}"
        name = layer_file(layer)
        saved = save_tensors(self.directory / name, tensors, {"format": "pt"})
        record = LayerRecord(
            layer=layer,
            file=name,
            num_bytes=saved.num_bytes,
            sha256=saved.sha256,
            header_sha256=saved.header_sha256,
            source_sha256=source_sha256,
            tensors=saved.tensors,
            errors=dict(sorted((errors or {}).items())),
        )
        self._records[layer] = record
        return record

    def register(self, record: LayerRecord, *, verify: bool = True) -> None:
        """Take over a file that another process, or an interrupted run, has published.

        `verify` False skips the SHA-256 of a file that a worker of this run has just written.

        Raises:
            ArtifactError: the file is absent or not the one that the record describes.
        """
        path = self.directory / layer_file(record.layer)
        present = record.file == path.name and path.is_file()
        if not present or (verify and sha256_file(path) != record.sha256):
            raise ArtifactError(
                f"{path} is not the file that was published for layer {record.layer}; delete "
                "it and quantize again, which redoes this layer only"
            )
        self._records[record.layer] = record

    def finish(
        self,
        *,
        calibration: CalibrationRecord | None,
        coverage: Mapping[int, list[int]],
        fallbacks: list[Fallback],
        tools: Mapping[str, str],
        kv_latent_amax: Mapping[int, float] | None = None,
    ) -> Manifest:
        """Write config, index, tokenizer and, last, the manifest. Every file must be registered."""
        keys = layer_keys(self.config)
        missing = [key for key in keys if key not in self._records]
        assert not missing, f"finish before layer {missing[0]} was published or registered"
        records = tuple(self._records[key] for key in keys)
        remove_scraps(self.directory)
        self._write_config()
        self._write_index(records)
        written = ["config.json", INDEX_FILE]
        for name in COPIED_FILES:
            if (self._source_dir / name).is_file():
                write_atomic(self.directory / name, (self._source_dir / name).read_bytes())
                written.append(name)
        manifest = Manifest(
            recipe=self.recipe,
            source=self._source,
            calibration=calibration,
            layers=records,
            coverage={layer: tuple(coverage[layer]) for layer in sorted(coverage)},
            fallbacks=tuple(fallbacks),
            tools=dict(sorted(tools.items())),
            files={name: sha256_file(self.directory / name) for name in sorted(written)},
            kv_latent_amax=dict(sorted((kv_latent_amax or {}).items())),
        )
        write_manifest(self.directory, manifest)
        return manifest

    def _write_config(self) -> None:
        content = json.loads((self._source_dir / "config.json").read_bytes())
        for key in _DROPPED_KEYS:
            content.pop(key, None)
        quantization = quantization_config(self.config, self.schemes)
        if quantization is not None:
            content["quantization_config"] = quantization
        write_json(self.directory / "config.json", content)

    def _write_index(self, records: tuple[LayerRecord, ...]) -> None:
        weight_map = {name: record.file for record in records for name in record.tensors}
        headers = (read_header(self.directory / record.file) for record in records)
        total = sum(entry.num_bytes for header in headers for entry in header.tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.directory / INDEX_FILE, content)

    def _refuse_foreign_directory(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise ArtifactError(f"{self.directory} is a file; --output must name a directory")
        if self.directory.resolve() == self._source_dir.resolve():
            raise ArtifactError(
                f"{self.directory} is the source checkpoint itself; choose another --output"
            )
        if (self.directory / MANIFEST_FILE).exists():
            other = read_manifest(self.directory)
            for input_name, recorded, ours in (
                ("recipe", other.recipe, self.recipe),
                ("source checkpoint", other.source, self._source),
            ):
                if recorded != ours:
                    raise ArtifactError(
                        f"{self.directory} is an output folder of another run: its {input_name} "
                        "differs; choose another --output or delete it"
                    )
        own_files = {layer_file(key) for key in layer_keys(self.config)}
        for path in sorted(self.directory.glob("*.safetensors")):
            if path.name not in own_files:
                raise ArtifactError(
                    f"{self.directory} is an output folder of another run: it holds {path.name}; "
                    "choose another --output or delete it"
                )
