"""Real streams of tasks: real texts and a real pre-trained model, fetched once, checked and cached."""

from manifold_cl.streams.catalogue import STREAMS, open_stream
from manifold_cl.streams.encoder import SentenceEncoder, load_encoder
from manifold_cl.streams.fetch import ARCHIVES, Archive, FetchError, cache_dir
from manifold_cl.streams.text import TextBatch, TextTask

__all__ = [
    "ARCHIVES",
    "STREAMS",
    "Archive",
    "FetchError",
    "SentenceEncoder",
    "TextBatch",
    "TextTask",
    "cache_dir",
    "load_encoder",
    "open_stream",
]
