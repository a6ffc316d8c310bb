"""A Flower app: clients train parts of an adapter, and a server adds them up."""
