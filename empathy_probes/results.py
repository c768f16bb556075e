"""What every result of the package can do: save itself, draw itself and show itself in a notebook.

A result is a frozen dataclass with `to_frame()`; what its figure and its page show is told by its table alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from empathy_probes.store import save_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result:
    """Base of the results."""

    def save(self, path: str | Path) -> None:
        """Save as one safetensors file with a JSON header."""
        save_record(self, path)

    def plot(self) -> Figure:
        """Draw the figure of the first concept, as `empathy_probes.plots.plot` does."""
        # Figures and pages stand on floors above; measuring should not load them.
        from empathy_probes import plots

        return plots.plot(self)

    def _repr_html_(self) -> str:
        from empathy_probes import report

        return report.result_html(self)
