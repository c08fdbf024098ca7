"""What the other rooms of an instance work with: its engine, its memory, its line to the router."""
