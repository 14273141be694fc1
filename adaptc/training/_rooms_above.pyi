# The public names of adaptc.training that lie in rooms above it, for type checkers. At run time the package looks them
# up by the strings of its table.
from adaptc.joint_training.datum import AdamParams as AdamParams
from adaptc.joint_training.datum import Datum as Datum
from adaptc.joint_training.remote_service import connect as connect
from adaptc.joint_training.sampling import SamplingParams as SamplingParams
from adaptc.joint_training.service import Service as Service
from adaptc.joint_training.sweep import sweep as sweep
