"""How much a coded model differs from the uncompressed one, how surely, where from, and if it got worse."""
