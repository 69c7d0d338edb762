"""The algebra of adapters: everything that the file tools are made of, in one place to import from.

All is computed in float32 on a working device, one layer at a time. It lies in

* `changes`: the change of a weight for every kind of adapter, sums, low-rank factors,
* `decomposition`: singular values and the choice of ranks,
* `blocks`: ratios by block; `places`: where modules lie in checkpoints,
* `merging`: whole files into models, and differences of models,
* `adapter_file`: files read module by module; `results`: files written; `report`: what was done.
"""

from networks.adapter_file import AdapterFile, same_family
from networks.blocks import BlockRatios
from networks.changes import LowRank, added, change, concatenated, nearest, nearest_to, resized, shuffled
from networks.decomposition import RankChoice, Svd, clamped, svd, svd_of_product
from networks.merging import Merged, Source, check_sources, difference, differences
from networks.places import Place, Places
from networks.report import Report

__all__ = [
    "AdapterFile",
    "BlockRatios",
    "LowRank",
    "Merged",
    "Place",
    "Places",
    "RankChoice",
    "Report",
    "Source",
    "Svd",
    "added",
    "change",
    "check_sources",
    "clamped",
    "concatenated",
    "difference",
    "differences",
    "nearest",
    "nearest_to",
    "resized",
    "same_family",
    "shuffled",
    "svd",
    "svd_of_product",
]
