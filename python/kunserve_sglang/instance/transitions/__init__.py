"""A member's side of a transition."""
