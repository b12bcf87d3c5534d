"""DSparse: every device trains what its own memory allows."""
