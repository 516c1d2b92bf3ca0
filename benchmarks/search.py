"""Whether `find_feature_by_examples` finds features for properties of text that are stated below.

    python benchmarks/search.py [--layer N] [--tokens N] [--examples N] [--draws N] [--development]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, SAEConfig
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.display import pieces

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

CONTEXT = 128
PROPERTIES = {  # group 1, or all of the match, has the property
    "inside a triple-quoted string": r'"""([\s\S]*?)"""',
    "module after import or from": r"^[ \t]*(?:import|from)[ \t]+([\w.]+)",
    "interactive session (>>>)": r"^[ \t]*>>> .*",
    "number": r"\b\d[\w.]*",
    "class definition line": r"^[ \t]*class \w.*",
    "raise statement": r"^[ \t]*raise\b.*",
    "comment": r"(?:^|(?<=\s))#(?=[ #!]).*",
    "name with two underscores (__x__)": r"\b__\w+__\b",
    "constant in capitals (A_B)": r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b",
    "path of a file, or URL": r"[\w.~:-]*/{1,2}[\w.~-]+/[\w./~-]*",
}
DEVELOPMENT = {
    "function definition line": r"^[ \t]*(?:async )?def \w.*",
    "parameters of a definition": r"\bdef \w+\(([^)]+)\)",
    "decorator": r"^[ \t]*@\w.*",
    "return statement": r"^[ \t]*return\b.*",
    "attribute of self": r"\bself\.(\w+)",
    "except line": r"^[ \t]*except\b.*",
    "name of an exception": r"\b[A-Z]\w+Error\b",
    "place in a format (%s)": r"%(?:\(\w+\))?[sdrxf]\b",
    "ruled line": r"[-=~*#]{5,}",
    "None, True or False": r"\b(?:None|True|False)\b",
    "condition": r"^[ \t]*(?:el)?if\b.*",
    "call of isinstance": r"\bisinstance\([^)]*\)",
}
