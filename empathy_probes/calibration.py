"""The instrument is measured before it measures: pairs of known truth, redrawn and judged, and their scorecard.

Each twin of a phantom base is made, all texts of the grammar's concepts run once through base and twin (the
population), and samples of 40, 100 and 300 scenarios are drawn from it and judged a thousand times as a study would
judge them. One file per twin and n is kept as soon as it is done, so that an interrupted run goes on where it
stopped; twins are independent and run in several processes. What a base computes is kept in `activations` for its twins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from empathy_probes import __version__
from empathy_probes.attacks import attack_rows, keyword_rows, null_rows
from empathy_probes.errors import InputError, StoreError, check_seed
from empathy_probes.metrics import COVERAGE, EXACT, FEWEST, Case
from empathy_probes.planting import has_twin, list_bases
from empathy_probes.populations import Options, Twin, exhibit, population, rehearsal
from empathy_probes.redraws import DRAWS, Outcomes, redraw
from empathy_probes.rehearsals import rehearsal_rows, speak
from empathy_probes.scorecard import Row, Scorecard, cell_family, proportion_row, score
from empathy_probes.secondary import MEASURES, Readings, proportions, read_redraws
from empathy_probes.store import digest_of, load_record, open_store, save_record, write_file

logger = logging.getLogger(__name__)
QUICK_SIZES = (40, 100)
ATTACKED = 100
"""Scenarios of every attack."""
MEASURED_UP_TO = 100
"""Largest sample of the secondary measures: their nested probes cost a second and more beyond."""
# What is planted in every base: concept, block, what is kept.
PLANTED = (
    ("valence", 3, 0.25), ("valence", 1, 0.5), ("valence", 2, 0.75), ("distance", 1, 0.25), ("distance", 3, 0.5),
    ("conflict", 2, 0.25), ("conflict", 4, 0.5),
    ("valence", 3, 0.92),  # just within the margin, where a false alarm is likeliest
)  # fmt: skip
# Twins about which whole studies are held: of `full_twins`, those of the first target at its first place.
REHEARSED = ("identical", "rotated", "planted", "erased", "local", "rerouted", "unread", "unsaid")


def full_twins(bases: Sequence[str]) -> tuple[Twin, ...]:
    """Every family for every base."""
    twins = []
    for base in bases:
        twins += [Twin(base, family) for family in ("identical", "rotated", "rescaled", "dtype", "continued")]
        twins += [Twin(base, "generic_gain", layer=2, keep=0.7)]
        twins += [Twin(base, "planted", *planted) for planted in PLANTED]
        twins += [Twin(base, "erased", "valence", 2, 0.0), Twin(base, "erased", "distance", 3, 0.0)]
        twins += [Twin(base, "local", "valence", 3, 0.25), Twin(base, "rerouted", "valence", 2, 0.25)]
        twins += [Twin(base, "unread", "valence", 1), Twin(base, "unsaid", "valence")]
    return tuple(twins)


def quick_twins(bases: Sequence[str]) -> tuple[Twin, ...]:
    """A few families of every base."""
    twins = []
    for base in bases:
        twins += [Twin(base, "rotated"), Twin(base, "rescaled"), Twin(base, "planted", "valence", 3, 0.25)]
    return tuple(twins)


def calibrate(
    out: str | Path,
    *,
    quick: bool = False,
    phantoms: str | Path | None = None,
    bases: Sequence[str] | None = None,
    redraws: int = 1000,
    workers: int | None = None,
    seed: int = 0,
) -> Scorecard:
    """Measure the instrument on pairs of known truth and save its scorecard.

    Args:
        out: folder of `scorecard.json`, `scorecard.csv` and of the finished parts, from which a run goes on.
        quick: a few twins of the shipped bases, few redraws: minutes.
        phantoms: folder that `scripts/build_phantoms.py --out` wrote; its bases and trained twins are used beside the
            shipped ones, and in place of one of the same name.
        bases: only these of them; scorecards of different bases can be `pooled`.
        redraws: scenario samples per cell and n, shared out among the cell's pairs.
        workers: processes; one per core by default.
        seed: of scenarios, samples and draws.

    Raises:
        InputError: the folder holds another scorecard, or a base is missing.
    """
    if redraws < 20:
        raise InputError(
            f"redraws got {redraws}, expected at least 20, better 1000: proportions resolve no finer; raise it"
        )
    check_seed(seed)
    if workers is not None and workers < 1:
        raise InputError(f"workers got {workers}, expected at least 1; leave it out for one per core")
    if quick and phantoms is not None:
        logger.warning(
            "a quick scorecard is of the shipped bases only: phantoms '%s' has no part in it", phantoms
        )
        phantoms = None
    there = list_bases(phantoms)
    missing = [name for name in bases or () if name not in there]
    if missing:
        raise InputError(
            f"there is no base '{missing[0]}', expected some of {', '.join(there)}; build it, or choose another"
        )
    if bases:
        there = {name: path for name, path in there.items() if name in bases}
    if quick:
        twins = quick_twins(list(there))
        options = Options(twins, QUICK_SIZES, 500, 200, min(redraws, FEWEST), seed=seed)
    else:
        wanted = full_twins(list(there))
        twins = tuple(twin for twin in wanted if has_twin(there[twin.base], twin.family))
        for twin in wanted:
            if twin not in twins:
                logger.warning(
                    "base '%s' has no trained twin '%s': the scorecard is without it", twin.base, twin.family
                )
        options = Options(twins, redraws=redraws, seed=seed, attack_redraws=min(redraws, 200),
                          measure_redraws=min(max(redraws // 5, 20), 200),
                          rehearsal_redraws=min(redraws, 100))  # fmt: skip
    return run_calibration(options, out, phantoms=phantoms, workers=workers)


def run_calibration(
    options: Options, out: str | Path, *, phantoms: str | Path | None = None, workers: int | None = None
) -> Scorecard:
    """The same for a chosen set of twins."""
    out = Path(out)
    code = _claim(out, options, phantoms)
    tasks = [(twin, _share(twin, options)) for twin in options.twins]
    todo = [task for task in tasks if not all(path.is_file() for path in _parts(out, task[0], options))]
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    there = len(tasks) - len(todo)
    with tqdm(total=len(tasks), initial=there, desc="pairs", unit="pair", disable=None) as bar:
        for done, twin in enumerate(_completed(todo, options, out, phantoms, workers), there + 1):
            bar.set_postfix_str(twin.key)
            bar.update()
            # A bar is shown on a terminal only, and hours of silence in a log look like a hang.
            logger.info("pair %d of %d is done: %s", done, len(tasks), twin.key)
    attacked = _attacked(options, out, phantoms)
    cases = [_case(twin, _load(_part(out, twin, n))) for twin, _ in tasks for n in options.sizes]
    card = Scorecard(
        (*score(cases), *_measured(options, out), *_rehearsed(options, out), *attacked),
        {**_provenance(options), "code": code},
    )
    card.save(out)
    return card


def _attacked(options: Options, out: Path, phantoms: str | Path | None) -> tuple[Row, ...]:
    """Attacks and ablations on the first base of every architecture, made once and kept."""
    rows: list[Row] = []
    if not options.attack_redraws:
        return ()
    firsts: dict[str, str] = {}
    for twin in options.twins:
        firsts.setdefault(twin.architecture, twin.base)
    for architecture, base in firsts.items():
        path = out / "parts" / f"{base}_attacks.json"
        if not path.is_file():
            few = replace(options, population=options.others)
            # Of draws of its own: two architectures must not be attacked with the same ones.
            seed = options.seed + zlib.crc32(base.encode())
            concept, layer, keep = PLANTED[0]
            made = attack_rows(
                population(Twin(base, "planted", concept, layer, keep), few, phantoms),
                population(Twin(base, "identical"), few, phantoms, frame="We met . "),
                population(Twin(base, "rescaled"), few, phantoms),
                exhibit(Twin(base, "planted", concept, layer, keep), few, phantoms),
                architecture, concept, layer, ATTACKED, options.attack_redraws, seed,
            )  # fmt: skip
            write_file(path, json.dumps([asdict(row) for row in made]).encode())
        rows += _read_rows(path)
    draws = options.attack_redraws
    return (*rows, *keyword_rows(ATTACKED, draws, options.seed), *null_rows(draws, options.seed))


def _completed(
    todo: Sequence[tuple[Twin, int]], options: Options, out: Path, phantoms: str | Path | None, workers: int
) -> Iterator[Twin]:
    if workers == 1:
        for twin, redraws in todo:
            yield _run_twin(twin, redraws, options, out, phantoms)
        return
    # Forked processes would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = [pool.submit(_run_twin, twin, redraws, options, out, phantoms) for twin, redraws in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    # numpy's BLAS as well: with a thread per core in every process, they wait for one another more than they compute.
    threadpool_limits(1)


def _run_twin(twin: Twin, redraws: int, options: Options, out: Path, phantoms: str | Path | None) -> Twin:
    bases = open_store(str(out / "activations"))
    if any(not _part(out, twin, n).is_file() for n in options.sizes):
        people = population(twin, options, phantoms, bases=bases)
    for n in options.sizes:
        path = _part(out, twin, n)
        if not path.is_file():
            many = max(round(redraws * min(1, 100 / n)), 2)
            save_record(redraw(people, n, many, options.seed + twin.samples), path)
    sizes = _measured_sizes(twin, options)
    if any(not _part(out, twin, n, "measures_").is_file() for n in sizes):
        shown = exhibit(twin, options, phantoms, bases)
    for n in sizes:
        path = _part(out, twin, n, "measures_")
        if not path.is_file():
            many = max(round(options.measure_redraws * redraws / options.redraws), 2)
            save_record(read_redraws(shown, n, many, options.seed + twin.samples), path)
    path = _rehearsal_part(out, twin)
    if _is_rehearsed(twin, options) and not path.is_file():
        held = rehearsal(twin, options, phantoms)
        spoken = {
            n: speak(held, n, options.rehearsal_redraws, options.seed + twin.samples) for n in QUICK_SIZES
        }
        write_file(path, json.dumps(spoken).encode())
    return twin


def _is_rehearsed(twin: Twin, options: Options) -> bool:
    first = next(t for t in options.twins if (t.base, t.family) == (twin.base, twin.family))
    return options.rehearsal_redraws > 0 and twin.family in REHEARSED and twin == first


def _rehearsal_part(out: Path, twin: Twin) -> Path:
    return out / "parts" / f"{twin.key}_rehearsal.json"


def _rehearsed(options: Options, out: Path) -> list[Row]:
    """Rates of what whole studies say, pooled over bases."""
    cells: dict[tuple[str, str, str, int], list[tuple[Twin, dict[str, Sequence[str]]]]] = {}
    for twin in options.twins:
        if _is_rehearsed(twin, options):
            spoken = _read_json(_rehearsal_part(out, twin))
            for n, words in spoken.items():
                cell = (cell_family(twin.family, twin.keep), twin.architecture, twin.concept or "", int(n))
                cells.setdefault(cell, []).append((twin, words))
    rows: list[Row] = []
    for cell, found in cells.items():
        pooled = {
            question: [word for _, words in found for word in words[question]] for question in found[0][1]
        }
        rows += rehearsal_rows(cell, found[0][0].layer, pooled)
    return rows


def _share(twin: Twin, options: Options) -> int:
    def cell(other: Twin) -> tuple[object, ...]:
        return other.family, other.architecture, other.concept, other.keep

    return -(-options.redraws // sum(cell(other) == cell(twin) for other in options.twins))


def _case(twin: Twin, outcomes: Outcomes) -> Case:
    # Nothing is missing from the residual stream of these: what differs is what is read from it, or said.
    encoded = twin.family in ("unread", "unsaid")
    return Case(
        twin.family, twin.architecture, None if encoded else twin.concept, twin.layer, twin.keep, outcomes
    )


def _part(out: Path, twin: Twin, n: int, kind: str = "") -> Path:
    return out / "parts" / f"{twin.key}_{kind}n{n}.safetensors"


def _measured_sizes(twin: Twin, options: Options) -> tuple[int, ...]:
    """Sizes at which secondary measures are sampled: not where both models are the same, to rounding."""
    if not options.measure_redraws or twin.family in EXACT:
        return ()
    return tuple(n for n in options.sizes if n <= MEASURED_UP_TO)


def _parts(out: Path, twin: Twin, options: Options) -> list[Path]:
    measured = [_part(out, twin, n, "measures_") for n in _measured_sizes(twin, options)]
    rehearsed = [_rehearsal_part(out, twin)] if _is_rehearsed(twin, options) else []
    return [*(_part(out, twin, n) for n in options.sizes), *measured, *rehearsed]


def _load(path: Path) -> Any:
    try:
        return load_record(path, {"Outcomes": Outcomes, "Readings": Readings})
    except StoreError:
        raise _damaged(path) from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        raise _damaged(path) from None


def _read_rows(path: Path) -> list[Row]:
    try:
        return [Row(**row) for row in _read_json(path)]
    except TypeError:
        raise _damaged(path) from None


def _damaged(path: Path) -> InputError:
    return InputError(
        f"'{path}' is damaged, expected a part that an earlier run wrote; delete {path} and run the same command again"
    )


def _measured(options: Options, out: Path) -> list[Row]:
    """Coverage of the secondary measures, pooled like every other cell."""
    cells: dict[tuple[str, str, str, int], list[Readings]] = {}
    for twin in options.twins:
        family = cell_family(twin.family, twin.keep)
        for n in _measured_sizes(twin, options):
            readings = _load(_part(out, twin, n, "measures_"))
            cells.setdefault((family, twin.architecture, twin.concept or "", n), []).append(readings)
    rows = []
    for cell, readings in cells.items():
        for i, (measure, column) in enumerate(MEASURES):
            entries = proportions(readings, i)
            if len(entries):
                name = f"coverage_{measure}_{column}"
                rows.append(proportion_row(*cell, name, entries, COVERAGE))
    return rows


def _provenance(options: Options) -> dict[str, Any]:
    return {
        "version": __version__, "redraws": options.redraws, "population": options.population, "others": options.others,
        "draws": DRAWS,
        "nuisance": options.nuisance, "doubt": options.doubt, "seed": options.seed, "sizes": list(options.sizes),
        "bases": sorted({twin.base for twin in options.twins}), "pairs": len(options.twins),
    }  # fmt: skip


def _claim(out: Path, options: Options, phantoms: str | Path | None) -> list[str]:
    """Refuse a folder that holds parts of another scorecard; mark an empty one as this one's.

    More pairs may be added to a scorecard: their parts stand beside those that are there.

    Returns:
        Digests of the package's source that its parts were made with.
    """
    mark = out / "parts" / "options.json"
    mine = _described(options, phantoms)
    found: dict[str, Any] = {}
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf8"))
            same = all(found[name] == mine[name] for name in ("version", "options")) and all(
                found[name].get(key, value) == value
                for name in ("redraws", "weights")
                for key, value in mine[name].items()
            )
            codes = list(found["code"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"'{mark}' is damaged, expected what an earlier run of this scorecard wrote there; choose another --out"
            ) from None
        if not same:
            raise InputError(
                f"'{out}' holds parts of a scorecard with other options or of other bases, expected none or the same; choose another --out"
            )
        if mine["code"][0] not in codes:
            logger.warning("'%s' goes on with other code than it was begun with; its scorecard says so", out)
        mine["code"] = list(dict.fromkeys([*codes, *mine["code"]]))
        for name in ("redraws", "weights"):
            mine[name] = {**found[name], **mine[name]}
    elif any(path.is_file() for path in out.rglob("*")):
        raise InputError(
            f"'{out}' is not empty and holds no scorecard's parts, expected an empty or new folder; choose another --out"
        )
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, json.dumps(mine, indent=1).encode())
    except OSError as error:
        raise InputError(
            f"'{out}' cannot be written ({error.strerror or error}), expected a writable folder; choose another --out"
        ) from None
    return list(mine["code"])


def _described(options: Options, phantoms: str | Path | None) -> dict[str, Any]:
    """All that decides what is in the parts, as JSON holds it."""
    there = list_bases(phantoms)
    said = asdict(options)
    del said["twins"]
    described = {
        "version": __version__,
        "options": said,
        "redraws": {twin.key: _share(twin, options) for twin in options.twins},
        # Configuration and tokenizer too: they decide what a base says as much as its weights.
        "weights": {
            f"{name}/{path.relative_to(there[name])}": hashlib.sha256(path.read_bytes()).hexdigest()
            for name in sorted({twin.base for twin in options.twins})
            for path in sorted(there[name].rglob("*"))
            if path.is_file()
        },
        "code": [digest_of([path.read_text(encoding="utf8") for path in sorted(Path(__file__).parent.glob("*.py"))])],
    }  # fmt: skip
    return dict(json.loads(json.dumps(described)))
