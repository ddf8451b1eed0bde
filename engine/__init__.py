"""One process's compute: models, paged pool, batch building, sampling, runner (floor 2)."""

assert __name__ == "diptych.engine", "import diptych.engine, never the bare folder"
