"""Moving bytes and messages between processes (floor 3)."""

assert __name__ == "diptych.transfer", "import diptych.transfer, never the bare folder"
