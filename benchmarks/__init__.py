"""Speed, memory and quality measured: `python -m benchmarks` for speed and memory, one script each for the rest."""
