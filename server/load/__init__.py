"""A load on an OpenAI-compatible server, and what it measured (`diptych bench`)."""
