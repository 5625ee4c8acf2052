"""The experiment of arXiv 2411.04388 on any corpus: in- against out-of-distribution unlearning, memorization and difficulty."""

from pyunlearn.study.config import PRESETS, Config
from pyunlearn.study.study import Study, run_study

__all__ = ["PRESETS", "Config", "Study", "run_study"]
