"""The training-goodput simulator: what fails, what a policy does about it, and where the time goes."""
