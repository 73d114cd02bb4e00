"""What runs on a cluster and ends: data, training, heads, sweeps, evaluation, the demo."""
