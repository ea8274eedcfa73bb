"""Predictions for the rows of a file, of any size, written into another file.

The rows are read, predicted and appended one part at a time to OUTPUT.partial, a line of JSON each. When all are there,
they are written as OUTPUT in its own format, under a temporary name first. A run that was stopped resumes behind the
last whole line of OUTPUT.partial, whose first line says of which run and of which data it is. Cells are written as they
are, secrets in them too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from siliang.data.hashes import source_sha256
from siliang.data.reading import Reading
from siliang.data.sources import open_source
from siliang.disk_errors import translate_disk_errors
from siliang.files import append, replacing, sha256
from siliang.language import Bilingual
from siliang.records import RECORD_NAME
from siliang.run_folder import OpenedRun
from siliang.types import ConfigError, InterruptedRunError, OutputError, first_line
from siliang.use.asked_rows import AskedRow, read_asked
from siliang.use.generate import write_texts
from siliang.use.predict import InputRow, check_options, check_predicts, predict, predict_tasks, read_rows
from siliang.use.sampling import Sampling

ROWS = 2048  # that are read, predicted and written at once
WRITTEN_ROWS = 64  # the same where texts are generated, which takes longer
TEXT = "text"  # the new column of a run that writes
KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
PREFIX = "predicted_"  # of the new columns: the file may have a column `label` of its own


def predict_file(
    run: OpenedRun,
    source: str,
    output: Path,
    *,
    sampling: Sampling | None = None,
    system: str = "",
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes the rows of `source` with the run's predictions, in their order and with all their columns.

    Args:
        sampling: How a run that writes text writes it; None: greedily.
        system: For such a run, a system message for rows without one.
        batch_size: For such a run, the texts that are written at once.
        output: A new .csv, .tsv, .jsonl or .parquet file.
        progress: Called with the number of rows that are done.

    Returns:
        The number of rows.

    Raises:
        ConfigError: `output` is of another kind, or an argument is not for the run.
        OutputError: `output` is there already, or its .partial is of another run or other data.
        DataError: A row cannot be read.
        InterruptedRunError: Ctrl-C; the same call resumes.
    """
    check_output(output)
    partial = output.with_name(f"{output.name}.partial")
    task, how = run.task, sampling or Sampling()
    writes = task.prompt is not None
    if not writes:
        check_no_writing(run, how, system, batch_size)
    (check_options if writes else check_predicts)(run)
    with translate_disk_errors(output.parent):
        more = {"sampling": json.dumps(how.values()), "system": system} if writes else {}
        header = f"{json.dumps(_identity(run, source) | more)}\n".encode()
        done = _begin(partial, header, output)
        rows: Iterator[InputRow | AskedRow] = read_asked(run, source, system) if writes else read_rows(run, source)
        next(islice(rows, done, done), None)  # those that are written already
        try:
            while part := list(islice(rows, WRITTEN_ROWS if writes else ROWS)):
                _check_columns(part, run)
                if writes:
                    answers = _texts(run, part, how, done, batch_size)
                else:
                    answers = _answers(run, [row for row in part if isinstance(row, InputRow)])
                lines = [_line(row, answer) for row, answer in zip(part, answers, strict=True)]
                with append(partial) as file:  # there is no such file before the first rows
                    file.write((b"" if done else header) + "".join(lines).encode())
                done += len(part)
                if progress is not None:
                    progress(done)
        except KeyboardInterrupt:
            if not partial.exists():
                raise InterruptedRunError(
                    Bilingual("Stopped before the first rows were written.", "已停止，尚未写入任何一行。")
                ) from None
            raise InterruptedRunError(
                Bilingual(
                    f"Stopped after {done:,} rows, which are in {partial}. The same command resumes with the next.",
                    f"已停止，前 {done:,} 行已写入 {partial}。再次运行同一命令即可继续。",
                )
            ) from None
        names: list[str] = []
        if not done:
            with append(partial) as file:
                file.write(header)
            names = [*_columns_of(run, source), *(f"{PREFIX}{name}" for name in _new_columns(run))]
        with replacing(output) as temporary:
            WRITERS[output.suffix](partial, temporary, names)
        partial.unlink()
    return done


def check_no_writing(run: OpenedRun, sampling: Sampling, system: str, batch_size: int | None) -> None:
    """
    Raises:
        ConfigError: An option of generating is given, for a run that does not generate text.
    """
    if sampling != Sampling() or system or batch_size is not None:
        raise ConfigError(
            Bilingual(
                f"{run.folder} does not generate text: it has no use for --temperature and the other options of "
                "sampling, --system and --batch-size (sampling, system and batch_size in Python). Leave them out.",
                f"{run.folder} 不生成文本：--temperature 等采样选项、--system 和 --batch-size 不适用（Python 中为 "
                "sampling、system 和 batch_size），请去掉。",
            )
        )


def check_output(output: Path) -> None:
    """
    Raises:
        ConfigError: Files of this kind are not written.
        OutputError: The file exists, or its folder does not.
    """
    if output.suffix not in KINDS:
        raise ConfigError(
            Bilingual(
                f"{output}: must end with one of {', '.join(KINDS)}.",
                f"{output}：扩展名应为 {'、'.join(KINDS)} 之一。",
            )
        )
    if output.exists():
        raise OutputError(
            Bilingual(
                f"{output} exists already: remove it, or choose another name.", f"{output} 已存在：请删除或换个名称。"
            )
        )
    if not output.parent.is_dir():
        raise OutputError(Bilingual(f"There is no folder {output.parent}.", f"找不到文件夹 {output.parent}。"))


def _identity(run: OpenedRun, source: str) -> dict[str, str]:
    """What the lines of a partial file depend on."""
    record = run.folder / RECORD_NAME
    return {
        "run": sha256(record) if record.is_file() else str(run.folder),
        "base": run.config.model,  # the one that is loaded
        "task_id": str(run.task_id),
        "top": str(run.top),
        "prompt_name": str(run.prompt_name),
        "min_confidence": str(run.min_confidence),
        "data": source_sha256(source),
    }


def _columns_of(run: OpenedRun, source: str) -> list[str]:
    """The columns of a file of data without rows, where its kind has them."""
    reading = Reading(run.config.data.header, "auto", run.config.data.separator, keeps_empty=True)
    opened = open_source(source, reading)
    for _ in opened.rows(next(iter(opened.parts)), reading):
        break
    return reading.columns


def _begin(partial: Path, header: bytes, output: Path) -> int:
    """The number of rows that a stopped run has left, after which a new one begins; a half line at the end goes, and
    so does a file without rows."""
    if not partial.exists():
        return 0
    with partial.open("rb+") as file:
        first = file.readline()
        if not file.readline().endswith(b"\n") and _is_header(first):
            partial.unlink()
            return 0
        file.seek(len(first))
        if first != header:
            raise OutputError(
                Bilingual(
                    f"{partial} is of another run, of other data or of other options ({_differs(first, header)}): "
                    f"give the same again, remove it, or choose another name than {output}.",
                    f"{partial} 属于另一次运行、别的数据或别的选项（{_differs(first, header).zh}）："
                    f"请用相同的选项，或删除它，或换一个不同于 {output} 的名称。",
                )
            )
        lines, end = 0, len(header)
        while (line := file.readline()).endswith(b"\n"):
            lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def _differs(first: bytes, header: bytes) -> Bilingual:
    """What two first lines of partial files say differently, in words."""
    if not _is_header(first):
        return Bilingual("its first line is another", "第一行不同")
    was, now = ({**made, **json.loads(made.get("sampling", "{}"))} for made in map(json.loads, (first, header)))
    names = [n for n in now | was if n != "sampling" and was.get(n) != now.get(n)]
    shown = [n if n in ("run", "data") else f"{n} {was.get(n)!r}" for n in names]  # their hashes say nothing
    return Bilingual(f"it was begun with {', '.join(shown)}", f"开始时为 {'、'.join(shown)}")


def _new_columns(run: OpenedRun) -> dict[str, object]:
    """What a prediction adds to a row without text, by the prediction's own names; the others repeat the texts."""
    if run.task.prompt is not None:
        return {TEXT: None}
    top: dict[str, object] = {"top": None} if run.top > 1 else {}
    return {name: value for name, value in run.task.blank.items() if value != ""} | top


def _answers(run: OpenedRun, rows: list[InputRow]) -> Iterator[dict[str, object]]:
    """The new columns of each row."""
    blank, filled = _new_columns(run), [row for row in rows if not row.is_blank]
    texts, tasks = [row.input for row in filled], [row.task for row in filled]
    found = predict_tasks(run, texts, tasks) if any(t is not None for t in tasks) else predict(run, texts)
    for row in rows:
        values = blank if row.is_blank else next(found).values()
        yield {f"{PREFIX}{name}": values[name] for name in blank if name in values}


def _texts(
    run: OpenedRun, rows: Sequence[InputRow | AskedRow], how: Sampling, first: int, batch_size: int | None
) -> Iterator[dict[str, object]]:
    """The text that the run writes for each row.

    Args:
        first: The number of the first row, from which its random numbers follow.
    """
    asked = {first + i: row.asked for i, row in enumerate(rows) if isinstance(row, AskedRow) and row.asked is not None}
    places = [row.where for row in rows if isinstance(row, AskedRow) and row.asked is not None]
    found = write_texts(run, list(asked.values()), how, numbers=list(asked), places=places, batch_size=batch_size)
    texts = dict(zip(asked, found, strict=True))
    for i in range(len(rows)):
        yield {f"{PREFIX}{TEXT}": texts.get(first + i)}


def _check_columns(rows: Sequence[InputRow | AskedRow], run: OpenedRun) -> None:
    """Refuses a file that has a column of the name of a new one."""
    new = {f"{PREFIX}{name}" for name in _new_columns(run)}
    if taken := sorted(new & {name for row in rows for name in row.values}):
        raise OutputError(
            Bilingual(
                f"the data has a column {taken[0]!r} already, which would be written over: rename it.",
                f"数据中已有列 {taken[0]!r}，会被覆盖：请改名。",
            )
        )


def _line(row: InputRow | AskedRow, answer: dict[str, object]) -> str:
    values = {name: None if value != value else value for name, value in {**row.values, **answer}.items()}  # NaN
    return f"{json.dumps(values, ensure_ascii=False, default=str)}\n"


def _is_header(line: bytes) -> bool:
    """Whether a line is the first of a partial file, of any call."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and {"run", "base", "data"} <= found.keys()


# ---- formats ----


def _lines(partial: Path) -> Iterator[dict[str, Any]]:
    with partial.open(encoding="utf-8") as file:
        next(file)
        yield from map(json.loads, file)


def _write_jsonl(partial: Path, output: Path, columns: Sequence[str]) -> None:
    with partial.open("rb") as file, output.open("wb") as new:
        file.readline()
        while block := file.read(1 << 20):
            new.write(block)


def _write_table(partial: Path, output: Path, columns: Sequence[str], *, delimiter: str) -> None:
    """The columns, then others in the order in which they first occur; lists and mappings as JSON."""
    names = dict.fromkeys([*columns, *(name for row in _lines(partial) for name in row)])
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        for row in _lines(partial):
            cells = {n: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for n, v in row.items()}
            writer.writerow(cells)


def _write_parquet(partial: Path, output: Path, columns: Sequence[str]) -> None:
    """Columns get the type that holds the values of all rows.

    Raises:
        OutputError: A column has values of different kinds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in _lines(partial) for name in row)

    def parts() -> Iterator[dict[str, list[Any]]]:
        rows = _lines(partial)
        while part := list(islice(rows, ROWS)):
            yield {name: [row.get(name) for row in part] for name in names}

    column = ""
    try:
        schema = pa.schema([pa.field(name, pa.string()) for name in columns])  # of a file without rows
        for part in parts():
            for column, values in part.items():
                own = pa.schema([pa.field(column, pa.array(values).type)])
                schema = pa.unify_schemas([schema, own], promote_options="permissive")
        with pq.ParquetWriter(output, schema) as writer:
            for part in parts():
                writer.write_table(pa.Table.from_pydict(part, schema=schema))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise OutputError(
            Bilingual(
                f"the column {column!r} cannot be written as .parquet: {first_line(error)}.\nThe predictions are kept "
                f"in {partial}: rename it to end with .jsonl.partial, and give the same command an --output with "
                ".jsonl.",
                f"列 {column!r} 无法写成 .parquet：{first_line(error)}。\n预测结果保存在 {partial}：请把它改名为以 "
                ".jsonl.partial 结尾，再用同一命令，把 --output 换成 .jsonl。",
            )
        ) from None


# Each takes the partial file, the new one, and the columns of a file without rows.
WRITERS: dict[str, Callable[[Path, Path, Sequence[str]], None]] = {
    ".csv": lambda partial, output, names: _write_table(partial, output, names, delimiter=","),
    ".tsv": lambda partial, output, names: _write_table(partial, output, names, delimiter="\t"),
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
