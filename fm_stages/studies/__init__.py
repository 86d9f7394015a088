"""What a person runs on models and data beside training."""

from fm_stages.studies.compare.command import compare_command
from fm_stages.studies.convert.command import import_command, import_network
from fm_stages.studies.diagnose.command import diagnose_command
from fm_stages.studies.doctor.command import doctor_command
from fm_stages.studies.encode import encode_command
from fm_stages.studies.evaluate.command import evaluate_command
from fm_stages.studies.export.command import export_command, export_file, export_folder
from fm_stages.studies.features.classifier import ClassifierFeatures
from fm_stages.studies.features.command import features_command
from fm_stages.studies.features.networks import DinoFeatures, InceptionFeatures
from fm_stages.studies.handover import handover_command
from fm_stages.studies.profile.command import profile_command
from fm_stages.studies.profile.study import Study, study_stages
from fm_stages.studies.replay.command import replay_command
from fm_stages.studies.runs import load_run
from fm_stages.studies.sample.command import sample_command
from fm_stages.studies.sources import Source, open_source

__all__ = [
    "ClassifierFeatures",
    "DinoFeatures",
    "InceptionFeatures",
    "Source",
    "Study",
    "compare_command",
    "diagnose_command",
    "doctor_command",
    "encode_command",
    "evaluate_command",
    "export_command",
    "export_file",
    "export_folder",
    "features_command",
    "import_command",
    "import_network",
    "handover_command",
    "load_run",
    "open_source",
    "profile_command",
    "replay_command",
    "sample_command",
    "study_stages",
]
