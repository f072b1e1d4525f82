"""Canvas attention, per backend."""
