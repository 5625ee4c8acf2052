"""Unlearning methods: plain functions of log-likelihoods or hidden states, one paper per file."""

from pyunlearn.methods.adaptive_rmu import adaptive_rmu
from pyunlearn.methods.ceu import ceu
from pyunlearn.methods.dpo import dpo
from pyunlearn.methods.flat import flat
from pyunlearn.methods.gradient_ascent import ga
from pyunlearn.methods.hinge import hinge
from pyunlearn.methods.idk import idk
from pyunlearn.methods.kl import kl
from pyunlearn.methods.kto import kto
from pyunlearn.methods.match import match
from pyunlearn.methods.npo import npo
from pyunlearn.methods.pdu import Multiplier, pdu
from pyunlearn.methods.refusals import REFUSALS
from pyunlearn.methods.registry import ALIASES, METHODS, OF_THE_LOOP, SYNONYMS, Method, resolve
from pyunlearn.methods.rmu import rmu
from pyunlearn.methods.satimp import satimp
from pyunlearn.methods.simnpo import simnpo
from pyunlearn.methods.tnpo import tnpo
from pyunlearn.methods.undial import undial
from pyunlearn.methods.wga import wga
from pyunlearn.methods.wtnpo import wtnpo

__all__ = [
    "ALIASES",
    "METHODS",
    "OF_THE_LOOP",
    "REFUSALS",
    "SYNONYMS",
    "Method",
    "Multiplier",
    "adaptive_rmu",
    "ceu",
    "dpo",
    "flat",
    "ga",
    "hinge",
    "idk",
    "kl",
    "kto",
    "match",
    "npo",
    "pdu",
    "resolve",
    "rmu",
    "satimp",
    "simnpo",
    "tnpo",
    "undial",
    "wga",
    "wtnpo",
]
