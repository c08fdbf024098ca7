"""The control plane: who is there, what has happened, and what is done about it."""
