"""What a model does on one prompt, and which features it is due to."""
