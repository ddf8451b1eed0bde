"""Functions on tensors: attention, linear, norms; C++ and reference backends (floor 1)."""

assert __name__ == "diptych.kernels", "import diptych.kernels, never the bare folder"
