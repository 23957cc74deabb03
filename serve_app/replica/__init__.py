"""The engine deployment: one engine behind the actor hop."""
