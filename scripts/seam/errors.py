"""What can go wrong while comparing, in words for the person who compares."""


class SeamError(Exception):
    """The table of names, or a record of them, cannot be used; the message says why."""
