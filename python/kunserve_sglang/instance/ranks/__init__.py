"""How the ranks of an instance stay in step."""
