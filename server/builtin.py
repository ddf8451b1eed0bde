"""The model that ships with the package: where it is and what it is called."""

from pathlib import Path
from typing import Final

BUILTIN_MODEL: Final = Path(__file__).parent / "builtin_model"
BUILTIN_NAME: Final = "diptych-builtin"
