"""A callback that writes down which modules a run had imported at its first step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback


class ModulesSeen(Callback):
    """Writes the names to a file, a JSON list.

    Args:
        file: the file.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def on_train_batch_end(self, *_: Any) -> None:
        if not self._file.exists():
            self._file.write_text(json.dumps(sorted(sys.modules)))
