"""What a person runs on models and data beside training."""

from fm_stages.studies.compare import compare_command
from fm_stages.studies.convert import import_command, import_network
from fm_stages.studies.diagnose import diagnose_command
from fm_stages.studies.diagnose_measure import diagnose
from fm_stages.studies.doctor import doctor_command
from fm_stages.studies.encode import encode_command
from fm_stages.studies.evaluate import evaluate_command
from fm_stages.studies.export import export_command, export_file, export_folder
from fm_stages.studies.features_classifier import ClassifierFeatures
from fm_stages.studies.features_networks import DinoFeatures, InceptionFeatures
from fm_stages.studies.features_train import features_command
from fm_stages.studies.handover import handover_command
from fm_stages.studies.profile import profile_command
from fm_stages.studies.replay import replay_command
from fm_stages.studies.runs import load_run
from fm_stages.studies.sample import sample_command
from fm_stages.studies.sources import Source, open_source
from fm_stages.studies.study import Study, study_stages

__all__ = [
    "ClassifierFeatures",
    "DinoFeatures",
    "InceptionFeatures",
    "Source",
    "Study",
    "compare_command",
    "diagnose",
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
