"""How many replicas a pool has: the policy that decides, and its way into Serve's controller."""
