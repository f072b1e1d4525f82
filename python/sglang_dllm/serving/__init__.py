"""What we add to the HTTP surface."""
