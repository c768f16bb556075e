"""Directions that are added to a model's activations, in doses relative to their size, and the file they live in.

One dose adds dose · rms · w: w is the unit direction, and rms the root mean square norm of *the running model's* activations at
that site over the tokens of neutral texts, each text's first token left out, because in many models it is out of all proportion.
A dose of 0.1 is thus a tenth of what stands there in any model, and no raw activation unit is carried from one
model to another. The raw coefficient, dose · rms, is handed out beside it.

In memory and in files rows keep the raw activation units they were fitted in, with the length that counts as one beside them, so
that sums and multiples add up exactly and other tools' files lose nothing. Layers are 0-based blocks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from empathy_probes.batches import pad_tokens
from empathy_probes.concepts import load_neutral
from empathy_probes.errors import InputError, StoreError
from empathy_probes.interventions import add_vector, cap_component, project_out
from empathy_probes.models import Model
from empathy_probes.prompts import render_texts
from empathy_probes.sites import COMPONENTS, Site
from empathy_probes.store import HEADER, SCHEMA_VERSION, check_schema, digest_of, write_file

Where = Callable[[Int[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]]
"""From positions, counted from each text's first token, to whether one is edited."""
LAYER_CONVENTION = "0-based block"
# States of all layers of one batch are held at once.
STATE_BYTES = 1 << 27
_RMS: dict[str, Float[np.ndarray, " layer"]] = {}
"""Digest of model, site and texts → rms; content-addressed, so an entry is right or absent."""


@dataclass(frozen=True)
class Dose:
    """What one `apply` adds."""

    dose: float
    """In units of the rms."""
    rms: Mapping[int, float]
    """Of the running model at the vector's site, by layer."""
    coefficient: Mapping[int, float]
    """dose · rms: what the unit direction is multiplied by, in raw activation units."""


@dataclass(frozen=True)
class SteeringVector:
    """A direction at one or more layers of one site."""

    direction: Float[np.ndarray, "layer d_model"]
    """Raw activation units of the model it was fitted in."""
    unit: Float[np.ndarray, " layer"]
    """Length that one dose stands for: the direction's own where it was fitted; kept by multiples, so that they are multiples."""
    layers: tuple[int, ...]
    """0-based block of each row, ascending."""
    site: str = "resid_post"
    concept: str = ""
    category: str = ""
    """Which category of the concept, where it has categories."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """name, revision, weights (digest) and architecture of the model it was fitted in; empty where unknown."""
    template: str = ""
    estimator: str = ""
    rms: tuple[float, ...] = ()
    """Of that model's states of the concept, per layer; empty where unknown."""
    seed: int = 0
    stimuli: str = ""
    """Digest of the texts."""
    n_layers: int | None = None
    """Blocks of that model; None where unknown."""
    notes: tuple[str, ...] = ()
    """What the file it was read from held and this does not."""

    def __post_init__(self) -> None:
        if len(self.direction) != len(self.layers) or len(self.unit) != len(self.layers) or not self.layers:
            raise InputError(
                f"a vector got {len(self.direction)} rows and {len(self.unit)} lengths for the layers {list(self.layers)}, expected one "
                "of each per layer, and one layer at least; pass them so"
            )
        if tuple(sorted(set(self.layers))) != self.layers or self.layers[0] < 0:
            raise InputError(
                f"a vector got the layers {list(self.layers)}, expected 0-based blocks in ascending order; sort them"
            )
        if self.site not in COMPONENTS:
            raise InputError(
                f"unknown site '{self.site}': expected one of {', '.join(COMPONENTS)}; name one of these"
            )
        if not (np.isfinite(self.direction).all() and (self.unit > 0).all()):
            raise InputError(
                f"the vector '{self.concept}' has entries that are not finite, or a length that is not positive, expected numbers; "
                "fit it again"
            )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.direction.shape[1])

    @property
    def relative(self) -> Float[np.ndarray, "layer d_model"]:
        """What a dose of 1 adds, in units of the rms: unit directions where nothing was added or multiplied."""
        return self.direction.astype(np.float64) / self.unit[:, None]

    def at(self, layer: int) -> SteeringVector:
        """The same at one of its layers only.

        Raises:
            InputError: the vector has no such layer.
        """
        if layer not in self.layers:
            raise InputError(
                f"layer {layer} of the vector '{self.concept}' does not exist, expected one of {list(self.layers)} (0-based blocks); "
                "choose among these"
            )
        i = self.layers.index(layer)
        rms = self.rms[i : i + 1]
        return replace(self, direction=self.direction[[i]], unit=self.unit[[i]], layers=(layer,), rms=rms)

    def __mul__(self, factor: int | float) -> SteeringVector:
        return replace(self, direction=self.direction * np.float32(factor))

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """Applying the sum is applying both; each row is in the units of the first that has it."""
        if (self.site, self.d_model) != (other.site, other.d_model):
            raise InputError(
                f"vectors at {self.site} of width {self.d_model} and at {other.site} of width {other.d_model} were added, expected one "
                "site and width; apply them one inside the other"
            )
        layers = tuple(sorted({*self.layers, *other.layers}))
        rows, units = [], []
        for layer in layers:
            held = [v.at(layer) for v in (self, other) if layer in v.layers]
            units.append(held[0].unit[0])
            rows.append(sum(v.direction[0].astype(np.float64) * (units[-1] / v.unit[0]) for v in held))
        same = [f for f in ("template", "estimator", "stimuli", "n_layers", "model", "seed", "category")
                if getattr(self, f) == getattr(other, f)]  # fmt: skip
        kept: dict[str, Any] = {name: getattr(self, name) for name in same}
        return SteeringVector(
            np.stack(rows).astype(np.float32), np.array(units), layers, self.site,
            f"{self.concept} + {other.concept}", **kept,
        )  # fmt: skip

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    # ------------------------------------------------------------ edits that stay

    @contextlib.contextmanager
    def apply(
        self,
        model: Model,
        dose: float,
        where: Where | None = None,
        neutral: Sequence[str] | None = None,
    ) -> Iterator[Dose]:
        """Add the vector in every run inside: `run`, `replay`, `generate`. Several may be nested; all leave as they entered.

        Args:
            model: steered; need not be the one the vector was fitted in.
            dose: in units of the rms of that model; one number for all layers of the vector.
            where: `from_position`, `only_positions`, or a function of one's own; all positions by default.
            neutral: texts the rms is measured on; the shipped ones by default.

        Raises:
            InputError: the model has not these layers or this width, or the dose is no finite number.
            EmpathyProbesError: nothing ran inside that the vector could be added to.
        """
        if not np.isfinite(dose):
            raise InputError(f"dose got {dose}, expected a finite number; choose one such as 0.1")
        rms = self._rms_of(model, neutral)
        added = Dose(dose, rms, {layer: dose * size for layer, size in rms.items()})
        rows = dict(zip(self.layers, self.relative, strict=True))
        edits = {
            Site(layer, self.site): add_vector(torch.as_tensor(rows[layer]), added.coefficient[layer])
            for layer in self.layers
        }
        with model.editing(edits, where):
            yield added

    @contextlib.contextmanager
    def project_out(self, model: Model, where: Where | None = None) -> Iterator[None]:
        """Remove the component along the vector at each of its layers in every run inside.

        Raises:
            InputError: as `apply`, or a row of the vector is zero.
        """
        edits = {site: project_out(row) for site, row in self._unit_rows(model).items()}
        with model.editing(edits, where):
            yield

    @contextlib.contextmanager
    def cap(
        self,
        model: Model,
        lower: float = -np.inf,
        upper: float = np.inf,
        where: Where | None = None,
        neutral: Sequence[str] | None = None,
    ) -> Iterator[None]:
        """Keep the component along the vector between two doses in every run inside.

        Args:
            model, where, neutral: as in `apply`.
            lower, upper: smallest and largest component, in units of the model's rms; one of them at least.

        Raises:
            InputError: as `project_out`, or the bounds cross or are both missing.
        """
        if not lower < upper or (np.isinf(lower) and np.isinf(upper)):
            raise InputError(
                f"cap got the bounds {lower} and {upper}, expected a lower one, an upper one, or both in order; give one"
            )
        rms = self._rms_of(model, neutral)
        edits = {
            site: cap_component(row, lower * rms[site.layer], upper * rms[site.layer])
            for site, row in self._unit_rows(model).items()
        }
        with model.editing(edits, where):
            yield

    def _unit_rows(self, model: Model) -> dict[Site, Tensor]:
        self._check_fits(model)
        size = np.linalg.norm(self.direction, axis=1)
        if not size.all():
            raise InputError(
                f"the vector '{self.concept}' is zero at layer {self.layers[int(size.argmin())]}, expected a direction there; leave "
                "that layer out"
            )
        return {
            Site(layer, self.site): torch.as_tensor(row / length)
            for layer, row, length in zip(self.layers, self.direction, size, strict=True)
        }

    def _rms_of(self, model: Model, neutral: Sequence[str] | None) -> dict[int, float]:
        self._check_fits(model)
        rms = neutral_rms(model, self.site, neutral)
        return {layer: float(rms[layer]) for layer in self.layers}

    def _check_fits(self, model: Model) -> None:
        if self.d_model != model.d_model or self.layers[-1] >= model.n_layers:
            raise InputError(
                f"the vector '{self.concept}' has width {self.d_model} and layers up to {self.layers[-1]}, but '{model.name}' has "
                f"width {model.d_model} and blocks 0 to {model.n_layers - 1}, expected a vector of such a model; choose another"
            )

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Save as safetensors: tensor `direction` `[n_layers d_model]`, zero where the vector has no row, and a JSON header."""
        deep = self.layers[-1] + 1 if self.n_layers is None else self.n_layers
        direction = np.zeros((deep, self.d_model), np.float32)
        direction[list(self.layers)] = self.direction
        metadata = {HEADER: json.dumps(self.header(), sort_keys=True)}
        write_file(Path(path), save({"direction": direction}, metadata=metadata))

    def header(self) -> dict[str, Any]:
        """Everything but the numbers, as plain data."""
        return {
            "schema_version": SCHEMA_VERSION, "concept": self.concept, "model": dict(self.model),
            "template": self.template, "site": self.site, "layers": list(self.layers),
            "layer_convention": LAYER_CONVENTION, "estimator": self.estimator, "rms": list(self.rms),
            "unit": [float(x) for x in self.unit], "seed": self.seed, "stimuli": self.stimuli,
            "n_layers": self.n_layers,
            **({"category": self.category} if self.category else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }  # fmt: skip


def make_vector(
    direction: Float[np.ndarray, "layer d_model"], layers: Sequence[int], **described: Any
) -> SteeringVector:
    """A vector whose rows' own lengths count as one dose.

    Args:
        direction: one row per layer, raw activation units.
        layers: 0-based blocks, ascending.
        **described: other fields of `SteeringVector`.
    """
    size = np.linalg.norm(direction.astype(np.float64), axis=1)
    unit = np.where(size > 0, size, 1.0)  # a zero row adds nothing, whatever the dose
    return SteeringVector(np.asarray(direction, np.float32), unit, tuple(layers), **described)


def check_not_zero(vector: SteeringVector) -> None:
    """Refuse a fitted direction that is zero somewhere: the texts' states do not differ there.

    Raises:
        InputError: it is; the message names the layer.
    """
    zero = [layer for layer, row in zip(vector.layers, vector.direction, strict=True) if not row.any()]
    if zero:
        raise InputError(
            f"the direction of '{vector.concept}' is zero at layer {zero[0]} of {vector.site}: its texts' states do not differ there, "
            "expected them to; choose a later layer"
        )


def load_vector(path: str | Path) -> SteeringVector:
    """Load what `SteeringVector.save` or a study wrote.

    Raises:
        StoreError: the file is missing, is no vector, or has a newer schema than this version knows.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        rows = load(data)["direction"]
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][HEADER])
    except OSError as error:
        raise StoreError(
            f"no vector can be read at {path} ({error.strerror}): expected a safetensors file; check the path"
        ) from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"{path} is no vector of this package ({type(error).__name__}): expected a tensor `direction` and a {HEADER} header; name its "
            "format, or make it again"
        ) from None
    return vector_from_header(rows, header, path)


def vector_from_header(rows: np.ndarray, header: Any, path: Path) -> SteeringVector:
    """A vector from all its rows `[n_layers d_model]` and what `SteeringVector.header` says, both as a file had them.

    Raises:
        StoreError: a newer schema, other layers than there are rows, another convention for them, or a header that is not ours.
    """
    if rows.ndim != 2 or not isinstance(header, dict):
        raise StoreError(
            f"{path} holds a direction of shape {list(rows.shape)} and a header that is a {type(header).__name__}, expected "
            "[n_layers, d_model] and a dict; make it again"
        )
    check_schema(header.get("schema_version", 1), path)
    convention = header.get("layer_convention")
    layers: Any = header.get("layers")
    named = isinstance(layers, list) and layers and all(type(i) is int and 0 <= i < len(rows) for i in layers)
    if convention != LAYER_CONVENTION or not named:
        raise StoreError(
            f"{path} counts layers as '{convention}' and names {layers} of {len(rows)} rows, expected '{LAYER_CONVENTION}' and rows "
            "for each; make it again"
        )
    # Files written before doses were: a direction's own length is one.
    kept = {name: header[name] for name in ("concept", "category", "model", "template", "estimator", "site", "seed", "stimuli")
            if name in header}  # fmt: skip
    deep = header.get("n_layers", len(rows))
    try:
        if deep is not None and deep <= max(layers):
            raise ValueError(f"{deep} blocks, but the layers {layers}")
        made = make_vector(
            rows[layers], layers, rms=tuple(header.get("rms", ())), notes=tuple(header.get("notes", ())), n_layers=deep, **kept
        )  # fmt: skip
        return replace(made, unit=np.array(header["unit"], float)) if "unit" in header else made
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{path} has a damaged {HEADER} header ({error}), expected what SteeringVector.save writes; make it again"
        ) from None


# ---------------------------------------------------------------- places


def from_position(first: int) -> Where:
    """All positions from this one on, counted from each text's first token; what is generated lies there too."""

    def there(positions: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        return positions >= first

    return there


def only_positions(positions: Sequence[int]) -> Where:
    """These positions alone, counted from each text's first token."""
    chosen = tuple(positions)

    def there(found: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        return torch.isin(found, torch.tensor(chosen, device=found.device))

    return there


# ---------------------------------------------------------------- size of what stands there


def neutral_rms(
    model: Model, site: str = "resid_post", neutral: Sequence[str] | None = None
) -> Float[np.ndarray, " layer"]:
    """Root mean square norm at every block of a site over neutral texts' tokens but the first of each.

    Norms are taken as the next read sees them: less the mean over d_model where the model subtracts it. Edits that are in place
    do not count. Measured once per weights, site and texts.

    Args:
        model: any.
        site: TransformerLens name.
        neutral: texts of no concept; the shipped ones by default.

    Raises:
        InputError: no text has a second token.
    """
    texts = load_neutral() if neutral is None else tuple(neutral)
    rows = [prompt.ids[: model.n_ctx] for prompt in render_texts(model.tokenizer, texts)]
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    if not rows:
        raise InputError(
            f"none of {len(texts)} neutral texts has a second token in '{model.name}', expected texts of several; give longer ones"
        )
    key = digest_of([model.fingerprint, site, rows])
    if key not in _RMS:
        with model.unedited():
            _RMS[key] = _measure_rms(model, [Site(layer, site) for layer in range(model.n_layers)], rows)
    return _RMS[key].copy()


def _measure_rms(
    model: Model, sites: Sequence[Site], rows: Sequence[Sequence[int]]
) -> Float[np.ndarray, " layer"]:
    total, count = np.zeros(len(sites)), 0
    step = max(1, STATE_BYTES // (4 * len(sites) * model.d_model * len(rows[0])))
    for start in range(0, len(rows), step):
        batch = pad_tokens(rows[start : start + step], model.device)
        with torch.inference_mode():
            run = model.run(batch, read=sites, last_layer=model.n_layers - 1)
        real = batch.mask[:, 1:].bool()
        for i, site in enumerate(sites):
            states = run.acts[site][:, 1:][real].double()
            states = states - states.mean(-1, keepdim=True) if model.centres else states
            total[i] += float((states**2).sum())
        count += int(real.sum())
    return np.sqrt(total / count)
