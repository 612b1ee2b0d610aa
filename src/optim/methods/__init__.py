"""The methods: one file a rule. Importing this package registers them."""

from optim.methods import agc, clippy, gc, lamb, plain

__all__ = ["agc", "clippy", "gc", "lamb", "plain"]
