"""The ground floor of the TigerBot platform: what every job and every server stands on."""

__version__ = "0.1.0"
