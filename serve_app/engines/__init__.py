"""Engine adapters behind one small protocol (protocol.py): embedded, and echo for tests."""
