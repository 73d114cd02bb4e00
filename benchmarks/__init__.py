"""Speed and memory, always beside a stock alternative in the same run. `make bench`, or `python -m benchmarks NAME`."""
