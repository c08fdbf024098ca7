"""What both planes share: messages, geometry, settings, errors. Imports no other room."""
