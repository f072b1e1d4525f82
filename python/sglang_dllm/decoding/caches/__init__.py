"""The cache strategies, one file each. Torch only."""
