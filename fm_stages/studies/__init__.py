"""What a person runs on models and data beside training."""

from fm_stages.studies.diagnose import diagnose, diagnose_command, load_run

__all__ = ["diagnose", "diagnose_command", "load_run"]
