"""The Grafana board: what it shows, its JSON, and a picture of it."""
