"""Speed, memory, compile time and accuracy against peers: `python -m benchmarks`."""
