"""Shows the figures that `analysis` returns: they are not pyplot's, so sphinx-gallery's own scraper misses them."""

from weakref import WeakSet

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

_shown: "WeakSet[Figure]" = WeakSet()


def scrape(block, block_vars, gallery_conf):
    """Save every Figure, or the figure of Axes, among a script's variables that pyplot does not manage, once."""
    managed = {plt.figure(number) for number in plt.get_fignums()}
    paths = []
    # pyplot numbers its figures, also those it has closed since
    for value in list(block_vars["example_globals"].values()):
        if isinstance(value, Axes):
            value = value.get_figure(root=True)
        if not isinstance(value, Figure) or value in managed or value in _shown or hasattr(value, "number"):
            continue
        _shown.add(value)
        paths.append(next(block_vars["image_path_iterator"]))
        value.savefig(paths[-1], dpi=130)
    return figure_rst(paths, gallery_conf["src_dir"])


def _get_sg_image_scraper():
    return scrape
