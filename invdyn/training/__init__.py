"""The train loop, checkpoints, Ray Train, Ray Tune, tracking."""
