"""Requests on their way to one instance and back."""
