"""The engine deployment: the gate, one engine behind the actor hop, and its messages."""
