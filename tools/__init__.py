"""Tools for people who work on the repository. The wheel does not contain them."""
