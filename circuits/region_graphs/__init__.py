"""Region graphs: which sets of variables a circuit's nodes are over, and how each is partitioned."""

from circuits.region_graphs.graph import Partition, RegionGraph

__all__ = ["Partition", "RegionGraph"]
