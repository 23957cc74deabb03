"""The extension that deepseek/native is built into; what is bound, its sources say."""

from typing import Any

def __getattr__(name: str) -> Any: ...
