"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``; needs no network."""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ.setdefault("MPLBACKEND", "agg")

# Address of the repository, such as ``https://HOST/OWNER/manifold_cl``: for links to source files and issues. Where it
# is not set, links to files lead to copies, and nothing links to the repository.
repository_url = os.environ.get("MANIFOLD_CL_REPOSITORY", "").rstrip("/")

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
    "arguments",  # our own, in _ext
    "dead_links",
    "docstrings",
    "links",
    "mathml",
    "retraction_table",
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
html_sidebars = {"*": [], "tutorials/*": []}  # the API and the decisions keep their list of pages
html_theme_options = {
    "logo": {
        "image_light": "_static/mark.svg",
        "image_dark": "_static/mark.svg",
        "text": "manifold_cl",
    },
    "header_links_before_dropdown": 6,
    "header_dropdown_text": "More",
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 1,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": [], "references": [], "tutorials/index": []},
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "friendly",
}
html_show_sourcelink = False
html_search_scorer = str(HERE / "_ext/search_scorer.js")
html_js_files = ["site.js"]
if repository_url:
    html_theme_options["icon_links"] = [
        {"name": "Repository", "url": repository_url, "icon": "fa-solid fa-code-branch"},
        {"name": "Issues", "url": f"{repository_url}/issues", "icon": "fa-regular fa-circle-dot"},
    ]
