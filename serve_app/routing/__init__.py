"""Between the HTTP API and the replicas: admission checks, and the client of the actor hop."""
