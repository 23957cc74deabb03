"""Writes the quantized checkpoint: a compressed-tensors directory with a manifest.

    config.json                     the source's, with compressed-tensors' quantization_config
    model-layer-00000.safetensors   one file per decoder layer, MTP layers included
    model-globals.safetensors       embeddings, final norm, head
    model.safetensors.index.json    for loaders that are not ours
    tokenizer files                 copied
    input_maxima.json               the largest input of each routed expert (input_maxima.py)
    intserve.json                   the manifest (deepseek/artifact/manifest.py); written last

`quantize` writes it: any process may publish a file, and one process finishes. The presence of
intserve.json means that the artifact is complete. `reader.py` reads it back and verifies it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deepseek.artifact.compressed_tensors import quantization_config
from deepseek.artifact.documents import read_copied
from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE, InputMaxima, find_outliers
from deepseek.artifact.manifest import (
    FORMAT_VERSION,
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
from deepseek.files import json_bytes, remove_scraps, sha256_file, write_atomic
from deepseek.outputs import check_apart, check_directory, make_directory
from deepseek.recipe import Recipe
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import read_header, save_tensors

#: Keys of the source's config.json that would be untrue of, or harmful in, the artifact.
_DROPPED_KEYS = ("auto_map", "_name_or_path", "quantization_config")


class ArtifactWriter:
    """Writes one quantized checkpoint file by file; each file is whole or absent.

    Several processes may each have a writer for the directory and publish files. The process that
    finishes registers the files of the others (`register`). The caller keeps two jobs out of one
    directory; the writer refuses a directory that holds another job's result.

    Raises on opening:
        ArtifactError: the directory belongs to another recipe, source or tool.
        OutputError: it cannot be made, or is inside the source checkpoint.
        RecipeError: the recipe does not fit the model.
    """

    def __init__(self, directory: Path | str, *, source: CheckpointReader, recipe: Recipe) -> None:
        self.directory = Path(directory)
        self.recipe = recipe
        self.config = source.config
        self.schemes = recipe.resolve(source.config)
        self._source_dir = source.directory
        self._source_config = source.config_content
        self._source = SourceRecord(
            fingerprint=source.fingerprint,
            config_sha256=source.config_sha256,
            weight_block_size=source.config.weight_block_size,
        )
        self._records: dict[LayerKey, LayerRecord] = {}
        self._refuse_foreign_directory()
        make_directory(self.directory)

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
        input_maxima: InputMaxima | None = None,
    ) -> Manifest:
        """Write config, index, tokenizer, input maxima (None: there are none) and, last, the
        manifest. Every file must be registered.

        Raises:
            CheckpointError: a file of the source cannot be copied; see `read_copied`, which a job
                has called before its first layer.
        """
        keys = layer_keys(self.config)
        missing = [key for key in keys if key not in self._records]
        assert not missing, f"finish before layer {missing[0]} was published or registered"
        records = tuple(self._records[key] for key in keys)
        remove_scraps(self.directory)
        files = self._files_beside(records)
        if input_maxima is not None:
            files[INPUT_MAXIMA_FILE] = input_maxima.to_bytes()
        for name, content in files.items():
            write_atomic(self.directory / name, content)
        manifest = Manifest(
            recipe=self.recipe,
            source=self._source,
            calibration=calibration,
            layers=records,
            coverage={layer: tuple(coverage[layer]) for layer in sorted(coverage)},
            fallbacks=tuple(fallbacks),
            tools=dict(sorted(tools.items())),
            files={name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)},
            kv_latent_amax=dict(sorted((kv_latent_amax or {}).items())),
            input_outliers=() if input_maxima is None else find_outliers(input_maxima),
        )
        write_manifest(self.directory, manifest)
        return manifest

    def restore_files(self, manifest: Manifest, input_maxima: bytes | None = None) -> None:
        """Write those files beside the tensors again that a finished artifact has lost, with the
        bytes that its manifest records. Every tensor file must be registered; the manifest stays
        as it is. `input_maxima` are the bytes of that file, which follow from nothing here; None
        where it is not lost.

        Raises:
            ArtifactError: the source no longer holds what a lost file was copied from.
        """
        remove_scraps(self.directory)
        files = self._files_beside(manifest.layers, form=manifest.format_version)
        if input_maxima is not None:
            files[INPUT_MAXIMA_FILE] = input_maxima
        for name, sha256 in manifest.files.items():
            path = self.directory / name
            if path.is_file() and sha256_file(path) == sha256:
                continue
            content = files.get(name)
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                raise ArtifactError(
                    f"{path} is missing or damaged, and {self._source_dir / name} is not what it "
                    f"was made from; put that file back, or delete {self.directory} and run again"
                )
            write_atomic(path, content)

    def _files_beside(
        self, records: tuple[LayerRecord, ...], *, form: int = FORMAT_VERSION
    ) -> dict[str, bytes]:
        """The content of every file beside the tensors and the manifest, by name, for a manifest of
        this form."""
        files = {"config.json": self._config(form), INDEX_FILE: self._index(records)}
        return files | read_copied(self._source_dir)

    def _config(self, form: int) -> bytes:
        content = dict(self._source_config)
        for key in _DROPPED_KEYS:
            content.pop(key, None)
        quantization = quantization_config(self.config, self.schemes, form=form)
        if quantization is not None:
            content["quantization_config"] = quantization
        return json_bytes(content)

    def _index(self, records: tuple[LayerRecord, ...]) -> bytes:
        weight_map = {name: record.file for record in records for name in record.tensors}
        headers = (read_header(self.directory / record.file) for record in records)
        total = sum(entry.num_bytes for header in headers for entry in header.tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json_bytes(content)

    def _refuse_foreign_directory(self) -> None:
        check_directory(self.directory)
        check_apart(self.directory, self._source_dir, "the source checkpoint")
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
