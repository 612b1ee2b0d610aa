"""From a time-ordered log to batches: schema, windows, sources and the Lightning data module."""

import os

# Row groups are large, short-lived blocks. Arrow's own allocator (mimalloc) keeps their memory, 40 to 70 MiB of it, and
# is no faster. Arrow looks once, when it is imported, and its Parquet reader takes no pool: hence the environment.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
