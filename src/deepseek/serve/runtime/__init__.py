"""What computes: requests on a packed engine, and the choice of their tokens."""
