"""The published algorithms, one file each. Torch only."""
