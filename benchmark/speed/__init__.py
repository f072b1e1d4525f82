"""Speed and memory, each measured against something else in the same run."""
