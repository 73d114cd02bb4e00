"""Recovery that keeps the living: a hub in the driver, a link in every worker, a keeper on every node."""
