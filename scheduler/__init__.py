"""Pure decisions: events in, commands out, time is an argument (floor 4)."""

assert __name__ == "diptych.scheduler", "import diptych.scheduler, never the bare folder"
