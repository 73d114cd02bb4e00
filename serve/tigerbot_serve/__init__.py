"""What runs on a cluster and stays: the engine, the ensemble and its OpenAI-compatible gateway."""
