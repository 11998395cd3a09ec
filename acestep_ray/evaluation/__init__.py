"""How good models are: losses on held-out songs, distances of what they make from real music, and its sanity."""
