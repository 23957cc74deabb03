"""What the interop tests recorded of the tools themselves, and where the matrix says otherwise.

A file of `tests/interop/records` holds, for one tool and version, what became of each built-in
recipe: loaded or refused, tensors that nothing read, parameters that held other values, the
differences from the embedded engine. `TOOL.json` is of what the tool is given, the directory of
`build` or, where that refuses, the artifact; `TOOL-artifact.json` is of the artifacts themselves.
The tests compare a fresh run with them; a default test compares them with the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.deployability import ARTIFACT_ROWS, ROWS, loader_refusals
from cluster.matrix import Handed, Row, Target
from cluster.rows import sglang
from deepseek.errors import DeployError
from deepseek.untrusted import UnusableFileError, parse_json_object, read_bytes

RECORDS = Path(__file__).resolve().parents[1] / "tests" / "interop" / "records"
#: Tools that are not ours.
TOOLS: tuple[Target, ...] = ("vllm", "sglang", "transformers")
#: First form of the artifact that the matrix's rows hold for, where older ones differ.
_FORMS: dict[Target, int] = {"sglang": sglang.ARTIFACT_FORM}
#: Part and format of every linear that a recipe makes, by the recipe's name.
Cells = Mapping[str, Iterable[tuple[str, str]]]


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Outcome(_Read):
    """What became of one recipe. `loaded` is None where the tool's loader did not run, only its
    choice of `schemes`; what a tool cannot give is None."""

    input: Handed = "artifact"
    loaded: bool | None = None
    refusal: str | None = None
    parameters: int | None = None
    unread: list[str] | None = None
    wrong: list[str] | None = None
    schemes: dict[str, str] | None = None
    kl_median: float | None = None
    kl_mean: float | None = None
    greedy_equal: int | None = None
    greedy_of: int | None = None

    def is_whole(self, drops: tuple[str, ...] = ()) -> bool:
        """Loaded, every tensor read but those whose names end with one of `drops`, and every
        parameter holding the artifact's value."""
        if self.loaded is not True or self.unread is None or self.wrong != []:
            return False
        return all(drops and name.endswith(drops) for name in self.unread)


class Record(_Read):
    """One tool in one version; `name` is the file's."""

    name: str = ""
    tool: Target
    version: str
    package: str
    test: str
    #: Form of the artifacts (`FORMAT_VERSION`) that the tool was given.
    artifact_form: int
    recipes: dict[str, Outcome]

    @property
    def speaks_of_artifacts(self) -> bool:
        """Whether its artifacts have the form that the matrix is about."""
        return self.artifact_form >= _FORMS.get(self.tool, 0)


def read_records(folder: Path = RECORDS) -> list[Record]:
    """All records, by file name.

    Raises:
        DeployError: one cannot be read.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            raw = parse_json_object(read_bytes(path, root=folder))
            records.append(Record.model_validate(raw | {"name": path.stem}))
        except (UnusableFileError, ValidationError) as error:
            raise DeployError(f"{path}: {' '.join(str(error).split())}") from None
    return records


def contradictions(records: Iterable[Record], cells: Cells) -> Iterator[str]:
    """One sentence for each thing that the matrix says and no record bears out, or a record says
    and the matrix does not."""
    by_tool: dict[Target, list[Record]] = {tool: [] for tool in TOOLS}
    for record in records:
        by_tool.setdefault(record.tool, []).append(record)
    for tool in TOOLS:
        for handed, rows in _lists(tool):
            for row in rows:
                if row.evidence == "executed":
                    yield from _unbacked(row, handed, by_tool[tool], cells)
        for record in by_tool[tool]:
            yield from _against(record, cells)


def _lists(tool: Target) -> Iterator[tuple[Handed, tuple[Row, ...]]]:
    yield "engine", ROWS[tool]
    if ARTIFACT_ROWS[tool] is not ROWS[tool]:
        yield "artifact", ARTIFACT_ROWS[tool]


def _unbacked(row: Row, handed: Handed, records: list[Record], cells: Cells) -> Iterator[str]:
    """Cells of an executed row for which no record has a run of that kind."""
    takes = row.loads or row.stops == "kernels"
    same = ARTIFACT_ROWS[row.target] is ROWS[row.target]
    ran: set[tuple[str, str]] = set()
    for record in records:
        if not row.is_about(record.version) or record.test != row.test:
            continue
        for recipe, outcome in record.recipes.items():
            if (same or outcome.input == handed) and (
                outcome.is_whole(row.drops) if takes else outcome.loaded is False
            ):
                ran |= set(cells.get(recipe, ()))
    for part, form in sorted(product(row.parts, row.formats)):
        if (part, form) not in ran:
            verb = "loads" if takes else "refuses"
            yield (
                f"{row.target} {verb} {part} as {form} ({handed}), executed by {row.test}: no "
                "record of that test has it"
            )


def _against(record: Record, cells: Cells) -> Iterator[str]:
    """Recipes of which the record and the matrix say different things."""
    for recipe, outcome in record.recipes.items():
        if recipe not in cells:
            yield f"{record.tool} {record.version}: recipe {recipe} of the record is unknown"
            continue
        if outcome.loaded is None or not (outcome.input == "engine" or record.speaks_of_artifacts):
            continue
        refusals = loader_refusals(cells[recipe], record.tool, record.version, outcome.input)
        if outcome.loaded and refusals:
            yield (
                f"{record.tool} {record.version} has loaded {recipe} ({outcome.input}), and the "
                f"matrix refuses it: {refusals[0]}"
            )
        if not outcome.loaded and not refusals:
            yield (
                f"{record.tool} {record.version} has refused {recipe} ({outcome.input}), and the "
                f"matrix loads it: {outcome.refusal}"
            )
