"""What a cache costs in bytes a token and what it loses of the dense gradient, measured on real positions."""
