"""What the command lines share: options, stopping, GPUs; refine is `python -m minicrf`."""
