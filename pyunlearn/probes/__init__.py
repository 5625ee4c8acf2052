"""The probes: what a model is asked, so that the metrics have numbers to work on."""

from pyunlearn.probes.decoding import greedy_continuations
from pyunlearn.probes.teacher_forced import TeacherForced, teacher_forced, without_prompt

__all__ = ["TeacherForced", "greedy_continuations", "teacher_forced", "without_prompt"]
