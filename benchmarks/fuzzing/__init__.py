"""What `benchmarks/fuzz.py` feeds, and to whom."""
