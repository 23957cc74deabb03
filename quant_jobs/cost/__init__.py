"""What a quantize job takes, on paper: work counted from shapes, divided by rates.

Here is what an estimate assumes where nothing else is said; the command line shows it as defaults,
so this file imports nothing.
"""

#: As MoE-Quant calibrates: 512 sequences of 4096 tokens.
CALIBRATION_TOKENS, BLOCK_TOKENS = 512 * 4096, 4096
#: Bytes per second of one node's storage, reads and writes together.
STORAGE = 7e9
