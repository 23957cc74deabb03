"""Opens a tokenizer without transformers where its files say nothing that needs it.

transformers takes a second of import, in each ingress, to apply tokenizer_config.json to the
tokenizer of tokenizer.json. What it does for the keys below, with values of these types, is here,
and a test compares the two bit by bit; a file or a key that is not known here is left to it.
Written after `TokenizersBackend` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Tokenizer, processors

from deepseek import untrusted

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
#: The files that may be there. Any other may add tokens.
_FILES = {_TOKENIZER, _CONFIG, "chat_template.jinja", "generation_config.json"}
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
#: Above this size transformers looks for a mistake of one family's vocabularies.
_MAX_VOCAB = 100_000


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: type(value) is kind


#: Keys of tokenizer_config.json that are known, and what their values may be. Whether BOS and EOS
#: are added to a text says tokenizer.json alone.
_KEYS: dict[str, Callable[[object], bool]] = {
    "add_bos_token": _is(bool),
    "add_eos_token": _is(bool),
    "chat_template": _is(str),
    "clean_up_tokenization_spaces": _is(bool),
    "model_max_length": _is(int),
    "tokenizer_class": lambda value: value == "PreTrainedTokenizerFast",
    **dict.fromkeys(_NAMED, lambda value: value is None or (type(value) is str and value != "")),
}


def open_plainly(files: Mapping[str, bytes]) -> Tokenizer | None:
    """What transformers would make of these files; None where it has to do so itself. The caller
    has read tokenizer.json before (deepseek/tokenizer_file.py).

    Raises:
        UnusableFileError: one that is read here is not JSON, or no object.
    """
    if not {_TOKENIZER, _CONFIG} <= files.keys() <= _FILES:
        return None
    config = untrusted.parse_json_object(files[_CONFIG])
    if not all(key in _KEYS and _KEYS[key](value) for key, value in config.items()):
        return None
    tokenizer = Tokenizer.from_buffer(files[_TOKENIZER])
    if tokenizer.padding or tokenizer.truncation or tokenizer.get_vocab_size() > _MAX_VOCAB:
        return None
    named = [config[key] for key in _NAMED if config.get(key) is not None]
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    if not all(name in added and _is_usual(added[name]) for name in named):
        return None
    if tokenizer.post_processor is None:
        tokenizer.post_processor = processors.TemplateProcessing("$A:0", "$A:0 $B:1")
    tokenizer.encode_special_tokens = False
    return tokenizer


def _is_usual(token: AddedToken) -> bool:
    """Whether it is a special token as transformers adds them, who then changes nothing."""
    unusual = token.single_word or token.lstrip or token.rstrip or token.normalized
    return token.special and not unusual
