"""How an endpoint follows its load."""
