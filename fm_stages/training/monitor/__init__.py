"""The oracle beside a run: what is measured of training and held-out images, and what is made of it."""
