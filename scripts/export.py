"""Export the model of a run: python scripts/export.py RUN_DIR --onnx; same as evenkeel export."""

import sys

from ranker.commands.export_commands import export as main

if __name__ == "__main__":
    sys.exit(main())
