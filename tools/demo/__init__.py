"""The training and the evaluation of the demo model."""
