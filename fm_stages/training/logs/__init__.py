"""Numbers, tables, figures and alerts to the run's folder and to loggers, which may fail."""
