"""The parts of ``benchmark.peers``: its checkpoint, and the engines side by side."""
