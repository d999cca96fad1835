"""Cases, peers, checks, clocks and physical bounds of the timing commands."""
