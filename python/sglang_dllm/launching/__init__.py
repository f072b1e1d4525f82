"""The processes of a server: how they start, answer probes, and end."""
