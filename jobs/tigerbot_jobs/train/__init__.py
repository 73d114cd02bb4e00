"""Training: one loop for pretraining, full fine-tuning and LoRA.

Engine (DeepSpeed), state (what a checkpoint holds) and data position (one integer) are separate objects: the loop
holds all three and none knows another.
"""
