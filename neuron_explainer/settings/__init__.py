"""Any frozen dataclass to and from a dict, TOML, JSON and command-line flags."""
