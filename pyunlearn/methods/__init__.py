"""The methods: each a plain function of per-example log-likelihoods, one paper per file."""

from pyunlearn.methods._registry import ALIASES, METHODS, Method, resolve
from pyunlearn.methods.gradient_ascent import ga
from pyunlearn.methods.npo import npo
from pyunlearn.methods.simnpo import simnpo

__all__ = ["ALIASES", "METHODS", "Method", "ga", "npo", "resolve", "simnpo"]
