"""How Sphinx builds the site: `sphinx-build -W --keep-going -q -b html docs docs/_build/html`."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

logging.getLogger("alembic").setLevel(logging.WARNING)  # else Optuna's import fills the screen

project = "matchai"
author = "the matchai authors"
html_title = "matchai"
html_theme = "furo"
html_static_path = ["_static"]
# nothing is loaded from elsewhere, so the pages open offline
html_theme_options = {"footer_icons": []}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_reference"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
smartquotes = False  # --flags keep both hyphens
default_role = "literal"  # docstrings mark names by single backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are told in the class, not as objects of their own
