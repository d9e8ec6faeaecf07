"""The networks: no noise, no sampling."""
