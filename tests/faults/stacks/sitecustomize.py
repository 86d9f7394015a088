"""Imported by every Python that the kill test starts: SIGUSR2 has it write where it is, just before it is killed."""

import faulthandler
import os
import signal

if "FM_STAGES_STACKS" in os.environ:
    _file = open(os.path.join(os.environ["FM_STAGES_STACKS"], str(os.getpid())), "w")  # noqa: SIM115 - for good
    faulthandler.register(signal.SIGUSR2, file=_file, all_threads=True)
