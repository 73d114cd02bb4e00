"""What the judge looks things up with, by name, from the server's own registry: search, rethink, calculator."""
