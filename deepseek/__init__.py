"""The model: config, checkpoints, number formats, the artifact contract and the embedded engine.

Ground floor. Imports no Ray, no HTTP, no telemetry, and none of our other packages.
"""

__version__ = "0.1.0"
