"""Endpoints of our own: the admin API, metrics, the dashboard."""
