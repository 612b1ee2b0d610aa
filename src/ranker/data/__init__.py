"""The data package: time-ordered logs, their schema, windows, loaders and the Lightning data module."""

import os

# Row groups are large, short-lived blocks. Arrow's own allocator (mimalloc) retains 40 to 70 MiB of their memory and is
# not faster. Arrow reads this variable once, at import, and its Parquet reader takes no pool argument.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
