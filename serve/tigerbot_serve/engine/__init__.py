"""The decoding engine: sequences in slots, one batch a step, one thread that owns torch."""
