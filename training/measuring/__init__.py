"""What is measured of a system, while it trains and at its end."""
