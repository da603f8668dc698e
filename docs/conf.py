"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``; needs no network."""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ.setdefault("MPLBACKEND", "agg")

project = "manifold_cl"
author = "the manifold_cl authors"
copyright = f"2026, {author}"
release = version = installed_version("manifold-cl")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "docstrings",  # our own, in _ext
    "links",
    "mathml",
    "retraction_table",
    "study_table",
    "tutorial_times",
]
exclude_patterns = [
    "_build",
    "gallery",
    "tutorials/*.ipynb",
    "tutorials/*.py",
    "**/sg_execution_times.rst",
]
nitpicky = False
# A single backtick is a cross reference where its target is documented, and set as code where it is not.
default_role = "py:obj"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Point", "Tangent", "Basis", "Square", "ArrayLike", "Array")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
autosummary_generate = False
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

doctest_global_setup = """
import torch
from analysis import *
from manifold_cl import *
from manifold_cl.continual.metrics import *
"""

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("matplotlib", "figure_scraper"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "capture_repr": (),
    "reset_modules": ("matplotlib", "tutorial_times.progress"),
    "reset_modules_order": "both",
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "manifold_cl"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/mark.svg"
html_sidebars = {
    page: []
    for page in (
        "index",
        "adapters",
        "analysis",
        "deviations",
        "geometry",
        "method",
        "optimizers",
        "subspaces",
        "vision-language",
        "choosing",
        "glossary",
        "which-number",
        "data",
        "record-format",
        "results",
        "studies",
        "references",
        "changelog",
        "tutorials/*",
    )
}
html_theme_options = {
    "logo": {
        "image_light": "_static/mark.svg",
        "image_dark": "_static/mark.svg",
        "text": "manifold_cl",
    },
    "header_links_before_dropdown": 8,
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 1,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": [], "tutorials/index": []},
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "friendly",
}
html_show_sourcelink = False
