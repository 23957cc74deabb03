"""tokenizer.json as a tokenizer of the `tokenizers` library, from bytes that were read already.

A tokenizer.json may fix a length to which every text is padded or cut. Those settings are of the
training that left them there: a padding of three thousand million tokens would fill the memory, a
cut would drop the end of a prompt without a word. Here a text is only ever encoded as it is.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from deepseek import untrusted
from deepseek.errors import first_line
from deepseek.untrusted import UnusableFileError


def parse_tokenizer(data: bytes) -> Tokenizer:
    """The tokenizer, without padding and truncation.

    Raises:
        UnusableFileError: it is not JSON, or not a tokenizer.
    """
    untrusted.parse_json_object(data)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing more specific
        raise UnusableFileError(
            f"is not a tokenizer of Hugging Face's: {first_line(error)}"
        ) from error
    except BaseException as error:
        # A failed assertion in the library's Rust code is no Exception, so that nothing catches it.
        if type(error).__name__ != "PanicException":
            raise
        raise UnusableFileError(
            f"is not a tokenizer that can be loaded: {first_line(error)}"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
