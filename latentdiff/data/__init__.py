"""Captioned pictures in folders, tars or ArrayRecord shards -> batches that are functions of (seed, step) alone."""

from latentdiff.data.buckets import full_buckets, make_buckets, nearest_buckets
from latentdiff.data.cache import Cache, StaleCacheError
from latentdiff.data.captions import SIDE_WORDS, names_side
from latentdiff.data.decode import BrokenPicture
from latentdiff.data.examples import Broken, BrokenPicturesError, BrokenPicturesWarning, Example, Index
from latentdiff.data.images import CaptionedImages, Plan
from latentdiff.data.latents import CachedLatents
from latentdiff.data.making import make_cache
from latentdiff.data.records import write_array_record
from latentdiff.data.sources import index_source, read_picture
from latentdiff.data.steps import OrderWarning, Steps
from latentdiff.data.tensors import to_tf_dataset

__all__ = [
    "SIDE_WORDS",
    "Broken",
    "BrokenPicture",
    "BrokenPicturesError",
    "BrokenPicturesWarning",
    "Cache",
    "CachedLatents",
    "CaptionedImages",
    "Example",
    "Index",
    "OrderWarning",
    "Plan",
    "StaleCacheError",
    "Steps",
    "full_buckets",
    "index_source",
    "make_buckets",
    "make_cache",
    "names_side",
    "nearest_buckets",
    "read_picture",
    "to_tf_dataset",
    "write_array_record",
]
