"""For every test: transformers must not take our folder `kernels` for the package of that name."""

import sys

sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None: "not installed"
