"""Lightning callbacks: what a run measures, and what ends it early."""
