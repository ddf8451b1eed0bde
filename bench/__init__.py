"""One command per claim; `python -m bench.NAME`. Results are recorded in bench/results/."""

import sys

# transformers asks for a package named `kernels`; in a source checkout it would find our folder.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None: "not installed"
