"""How much one request may ask for: the limits that the body's schema and admission share.

A limit of the model (its context, its vocabulary) or of the deployment (`ServeConfig`) is not here.
"""

from __future__ import annotations

#: Choices that one request may ask for, over all of its prompts; so it has no more prompts either.
MAX_CHOICES = 128
MAX_PROMPTS = MAX_CHOICES

#: Values (objects, lists, strings, numbers, ...) in a body. Three full contexts of token ids have
#: fewer. More of them than that cost more memory and time to parse than they can be worth.
MAX_VALUES = 1 << 19
#: Strings, keys included, and also objects and lists, each of which costs ten times a number. A
#: conversation of MAX_MESSAGES messages has fewer.
MAX_STRINGS = 1 << 16
#: Digits in a row; the engine's integers have 19, and no float needs more.
MAX_DIGITS = 128
#: Nesting of a body's objects and lists; a message's parts are at depth 5.
MAX_DEPTH = 64

MAX_MESSAGES = 4096
#: Text parts of one message.
MAX_PARTS = 1024
MAX_STOP_STRINGS = 16
#: Characters of one stop string.
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
#: Characters and values that a label (`user`, `metadata`, ...) may have in all.
MAX_LABEL = 16384

#: Integers are the engine's, of 64 bits.
MIN_INT, MAX_INT = -(2**63), 2**63 - 1

#: Bodies of at most this many bytes are parsed at once; longer ones wait for one of the threads.
INLINE_BODY_BYTES = 16384
#: Bodies that are parsed at one time.
PARSER_THREADS = 2
