"""From a time-ordered log to batches: schema, windows, sources and the Lightning data module."""
