"""Processes and front doors: HTTP, workers, supervisor, embedded engine, CLI (floor 5)."""

assert __name__ == "diptych.server", "import diptych.server, never the bare folder"
