"""Data plane: what happens inside one instance. Knows no SGLang (see `engine.Engine`)."""
