"""Engines of others behind the gateway, each where it is installed and only for what it can do."""
