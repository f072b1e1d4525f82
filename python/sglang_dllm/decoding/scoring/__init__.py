"""The methods that score a given continuation: it is revealed, nothing is drawn."""
