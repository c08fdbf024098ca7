"""What can go wrong while building the fork, in words for the person who builds it."""


class ForkError(Exception):
    """The fork cannot be built; the message says why in one line or a few."""
