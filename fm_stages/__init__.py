"""fm-stages: train flow-matching image models with the exact oracle velocity beside them."""

__version__ = "0.1.0"
