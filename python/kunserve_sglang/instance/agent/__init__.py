"""An instance's mode, its parts, and its line to the router."""
