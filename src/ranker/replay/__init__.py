"""Divergences replayed: the minutes around an event, kept in a capsule, trained again, differently, and taken apart."""
