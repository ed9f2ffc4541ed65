"""Pictures of circuits, region graphs, flows, samples and learning curves."""

from circuits.plot.charts import learning_curves, samples
from circuits.plot.drawing import flows, region_graph, structure

__all__ = ["flows", "learning_curves", "region_graph", "samples", "structure"]
