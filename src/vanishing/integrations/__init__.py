"""Training frameworks, one a file: each moves the clock as the framework counts and follows its checkpoints."""
