"""matchai."""
