"""config.json of the DeepSeek-V3 family, read strictly: every key is understood, fixed, or known to
be inert.

The family is what shares DeepSeek-V3's architecture (`FAMILY`). Moonlight has no query latent
(`q_lora_rank` null). DeepSeek-V3.2 adds an indexer that chooses the `index_topk` tokens that a
query attends to; up to that context it is DeepSeek-V3 (`dense_context`).

A key that changes the forward pass is implemented or refused by name. Keys are therefore sorted
into three tables: fields of `ModelConfig`, `FIXED` (one value implemented), and `INERT` (no effect
on the forward pass); the last two are in `config_keys.py`. Any other key is an error.

YaRN (arXiv 2309.00071) applies whenever the config has it, as in transformers, whatever the serving
limit is. DeepSeek's own inference code applies it only when its `max_seq_len` exceeds the original
context, so that the serving limit changes the model's answers; here it does not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deepseek.config_keys import FIXED, INERT
from deepseek.config_values import (
    YarnScaling,
    check_fields,
    check_layer_types,
    read_block_size,
    read_rope,
    read_token_ids,
)
from deepseek.errors import ConfigError
from deepseek.limits import MAX_TENSORS, num_source_tensors
from deepseek.untrusted import UnusableFileError, parse_json_object, read_bytes, show

CONFIG_FILE = "config.json"

#: `model_type` of config.json -> the class names that its checkpoints give under `architectures`.
FAMILY = {
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    "kimi_k2": ("DeepseekV3ForCausalLM",),
    "deepseek_v32": ("DeepseekV32ForCausalLM",),
}
#: The same for people, in sentences that refuse other architectures.
FAMILY_NAMES = "DeepSeek-V3, R1, V3.1, V3.2, Kimi-K2 and Moonlight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one model of the family; names as in the release.

    `q_lora_rank` None: queries are projected from the hidden state by one `q_proj`. `index_*` are
    DeepSeek-V3.2's, None elsewhere. `weight_block_size` is the source's FP8 tile (rows, columns),
    None for a BF16 source. `eos_token_id` separates documents; where config.json lists several
    tokens that end a text, it is the first, and the others are `more_eos_token_ids`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnScaling | None
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    weight_block_size: tuple[int, int] | None = None
    model_type: str = "deepseek_v3"
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    more_eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "")
        self._check_indexer()
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"config.json: n_routed_experts {self.n_routed_experts} is not a multiple of "
                f"n_group {self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ConfigError(
                f"config.json: topk_group {self.topk_group} is more than n_group {self.n_group}"
            )
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} is more than the "
                f"{reachable} experts of topk_group {self.topk_group} groups"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"config.json: qk_rope_head_dim {self.qk_rope_head_dim} is odd")
        for key, ids in (("bos", (self.bos_token_id,)), ("eos", self.eos_token_ids)):
            for token_id in ids:
                if token_id is not None and token_id >= self.vocab_size:
                    raise ConfigError(
                        f"config.json: {key}_token_id {token_id} is no token of vocab_size "
                        f"{self.vocab_size}"
                    )
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ConfigError(
                f"config.json: first_k_dense_replace {self.first_k_dense_replace} lies outside "
                f"0..num_hidden_layers {self.num_hidden_layers}"
            )
        num_tensors = num_source_tensors(self.num_layers_with_mtp, self.n_routed_experts)
        if num_tensors > MAX_TENSORS:
            raise ConfigError(
                f"config.json: {self.num_layers_with_mtp} layers of {self.n_routed_experts} "
                f"experts are about {num_tensors:,} tensors, more than {MAX_TENSORS:,}; correct "
                "num_hidden_layers or n_routed_experts"
            )

    def _check_indexer(self) -> None:
        """Check that the indexer's shapes are given for DeepSeek-V3.2 and for nothing else."""
        for key in ("index_n_heads", "index_head_dim", "index_topk"):
            given = getattr(self, key) is not None
            if given and not self.has_indexer:
                raise ConfigError(
                    f"config.json: {key} belongs to model_type 'deepseek_v32', not to "
                    f"{self.model_type!r}; correct model_type"
                )
            if self.has_indexer and not given:
                raise ConfigError(f"config.json: key {key!r} is missing")
        if self.has_indexer and self.q_lora_rank is None:
            raise ConfigError("config.json: q_lora_rank must be a positive int for 'deepseek_v32'")
        if self.index_head_dim is not None and self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(
                f"config.json: index_head_dim {self.index_head_dim} is less than qk_rope_head_dim "
                f"{self.qk_rope_head_dim}, which is a part of it"
            )

    @property
    def has_indexer(self) -> bool:
        """Whether every layer has DeepSeek-V3.2's indexer (sparse attention)."""
        return self.model_type == "deepseek_v32"

    @property
    def dense_context(self) -> int:
        """Tokens of context up to which attention is dense, so that what IntServe computes is the
        model: all positions, or `index_topk` with an indexer, which then leaves no token out."""
        return min(self.max_position_embeddings, self.index_topk or self.max_position_embeddings)

    @property
    def context_limit(self) -> str:
        """`dense_context` in words that say what the limit is, for sentences that refuse more."""
        if self.dense_context == self.max_position_embeddings:
            return f"the model's {self.max_position_embeddings} positions"
        return (
            f"the {self.dense_context} tokens (index_topk) within which DeepSeek-V3.2's attention "
            "is dense, which is all that IntServe computes"
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, none or several."""
        return () if self.eos_token_id is None else (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: the part without position plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer under absorbed MLA: compressed latent plus rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_layers_with_mtp(self) -> int:
        """Decoder layers in the checkpoint: the main layers, then the MTP layers."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        """Whether this layer routes to experts. MTP layers always do, as in the release."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_directory(cls, directory: Path | str) -> ModelConfig:
        """Read DIR/config.json.

        Raises:
            ConfigError: the file is absent, is no JSON object, is not a regular file inside the
                directory, or holds an unknown or unsupported value.
        """
        return cls.from_dict(read_config(directory)[1])

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Build from the parsed config.json; see `from_directory` for the errors."""
        given = dict(raw)
        if ours := sorted(_OURS & given.keys()):
            raise ConfigError(f"config.json: unknown key {ours[0]!r}; remove it or report it")
        _check_family(given)
        check_layer_types(given)
        for key, allowed in FIXED.items():
            if key in given and given.pop(key) not in allowed:
                raise ConfigError(
                    f"config.json: {key} = {show(raw[key])} is not implemented; "
                    f"only {' or '.join(repr(value) for value in allowed)} is"
                )
        for key in INERT:
            given.pop(key, None)
        if given.get("num_nextn_predict_layers", 0) is None:
            given["num_nextn_predict_layers"] = 0
        heads = given.pop("num_key_value_heads", given.get("num_attention_heads"))
        if heads != given.get("num_attention_heads"):
            raise ConfigError(
                f"config.json: num_key_value_heads {show(heads)} differs from num_attention_heads "
                f"{show(given.get('num_attention_heads'))}; MLA caches one latent for all heads"
            )
        given["rope_theta"], given["yarn"] = read_rope(given)
        if isinstance(given.get("eos_token_id"), list):
            ids = read_token_ids(given["eos_token_id"], "config.json: eos_token_id")
            given["eos_token_id"], given["more_eos_token_ids"] = ids[0], ids[1:]
        given["weight_block_size"] = read_block_size(given.pop("quantization_config", None))

        known = {field.name for field in fields(cls)}
        if extra := sorted(set(given) - known):
            raise ConfigError(f"config.json: unknown key {show(extra[0])}; remove it or report it")
        required = {field.name for field in fields(cls) if field.name not in _OPTIONAL}
        if missing := sorted(required - set(given)):
            raise ConfigError(f"config.json: key {missing[0]!r} is missing")
        return cls(**given)


def read_config(directory: Path | str) -> tuple[bytes, dict[str, Any]]:
    """DIR/config.json as it is stored, and the object that it holds.

    Raises:
        ConfigError: as `ModelConfig.from_directory`, except for the values.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        content = read_bytes(path, root=Path(directory))
        return content, parse_json_object(content)
    except UnusableFileError as error:
        there = path.exists() or path.is_symlink()
        hint = "" if there else "; --model must name a directory in the Hugging Face layout"
        raise ConfigError(f"{path} {error}{hint}") from error


_OPTIONAL = {
    "num_nextn_predict_layers",
    "bos_token_id",
    "eos_token_id",
    "weight_block_size",
    "model_type",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "more_eos_token_ids",
}


#: Fields whose names are ours: config.json gives them in another form.
_OURS = {"yarn", "weight_block_size", "more_eos_token_ids"}


def _check_family(given: dict[str, Any]) -> None:
    """Check model_type and architectures; takes the second out of `given`.

    Raises:
        ConfigError: another architecture; the sentence names it and what is supported.
    """
    model_type, architectures = given.get("model_type"), given.pop("architectures", None)
    if model_type is None:
        raise ConfigError("config.json: key 'model_type' is missing")
    if not isinstance(model_type, str) or model_type not in FAMILY:
        raise ConfigError(
            f"config.json: model_type {show(model_type)} is another architecture; IntServe "
            f"quantizes {FAMILY_NAMES} (model_type {', '.join(FAMILY)})"
        )
    if architectures is not None and architectures != [*FAMILY[model_type]]:
        raise ConfigError(
            f"config.json: architectures = {show(architectures)} is not what model_type "
            f"{model_type!r} has, {[*FAMILY[model_type]]!r}"
        )
