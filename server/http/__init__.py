"""The OpenAI-compatible front door: FastAPI routes over an `EngineClient` and the text layer."""
