"""Starting, watching and ending all processes."""
