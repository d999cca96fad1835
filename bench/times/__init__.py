"""What the timing commands share: cases, peers, checks, clocks, and the physics that bounds a time."""
