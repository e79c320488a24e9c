"""Takes a small or mid-sized model through its whole life on the machines you have."""
