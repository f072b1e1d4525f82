"""How long a canvas gets: one file for each rule."""
