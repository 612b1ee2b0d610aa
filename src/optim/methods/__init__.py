"""The methods: one file a rule. Importing this package registers them."""

from optim.methods import ablations, agc, clippy, gc, lamb, plain

__all__ = ["ablations", "agc", "clippy", "gc", "lamb", "plain"]
