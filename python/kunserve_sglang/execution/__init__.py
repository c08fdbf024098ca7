"""What an instance and the simulator decide by, about work in the pipeline; pure."""
