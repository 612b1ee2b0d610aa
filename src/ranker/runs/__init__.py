"""What identifies a run and what it leaves: its folder, its configuration's identity, its provenance."""
