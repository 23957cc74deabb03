"""The engine protocol (protocol.py) and its adapters, one file each; app.py chooses one."""
