"""The only room that touches SGLang's internals; moving to a newer SGLang changes this room."""
