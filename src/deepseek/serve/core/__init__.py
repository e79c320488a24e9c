"""What runs next: requests, pages, the scheduler. Pure Python: no torch, no clock, no threads."""
