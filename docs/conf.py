"""How Sphinx builds the documentation: ``sphinx-build -W --keep-going -n docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from kpmd import __version__

project = "kpmd"
release = version = __version__
copyright = "the kpmd authors"  # noqa: A001 - Sphinx's word

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "kpmd_reference",
]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = "kpmd"
html_static_path = ["_static"]
html_css_files = ["kpmd.css"]
templates_path = []

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

#: Transcripts and excerpts of JSON have … in the place of what is left out; and parameters that are
#: named as members of several answers, ``type`` say, are none of these.
suppress_warnings = ["misc.highlighting_failure", "ref.python"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
#: What other projects document is not linked to, so that nothing is fetched; and names inside of
#: annotations are those of the code, not of the documentation.
nitpick_ignore_regex = [("py:.*", r".*")]
