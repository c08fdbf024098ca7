"""The admin API: its types, its table of calls, and a client."""
