"""The frozen models: found, pinned, loaded, asked. They are never trained."""
