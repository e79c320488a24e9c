"""The server: many users of one model on one small machine, and whether its answers are good."""
