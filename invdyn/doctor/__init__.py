"""What is wrong with a recording, said before anyone trains on it."""
