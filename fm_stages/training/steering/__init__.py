"""What measured stages change about training, and what a run's curves promise."""
