"""Load a teacher and make a student from it."""

from ..config import INITS
from .calibration import calibrate
from .student import convert, layer_kinds, sliding_control
from .teacher import FAMILIES, Teacher, load_teacher

__all__ = ["FAMILIES", "INITS", "Teacher", "calibrate", "convert", "layer_kinds", "load_teacher", "sliding_control"]
