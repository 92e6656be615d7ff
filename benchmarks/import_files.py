"""The files of tables for import_table.py: CSV, Parquet, and folders of Parquet files. Columns are read by name; a
column of lists becomes one column per place, `name[0]`, `name[1]`, ..."""

import contextlib
import re
import textwrap
import urllib.parse
import warnings
from pathlib import Path

import numpy as np
from common import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zip", ".zst")
PANDAS_INDEX = r"__index_level_\d+__"  # a column in which pandas keeps the numbers of the rows
MAX_PLACES = 1024  # of a column of lists, beyond which it is an image


def extension(source):
    """The extension of a file in small letters, without that of a compression."""
    endings = [x.lower() for x in Path(source).suffixes]
    if len(endings) > 1 and endings[-1] in COMPRESSIONS:
        endings.pop()
    return endings[-1] if endings else ""


def is_parquet(source):
    """Whether it is a Parquet file or a folder, which may hold some."""
    return extension(source) in (".parquet", ".pq") or Path(source).is_dir()


def refuse_empty(name, empty):
    """empty [n]: flags of the rows without a value."""
    raise DataError(f"column {name} is empty in row {empty.argmax()} (from 0): fill or remove such rows")


def open_table(path, args, note):
    """Returns the names of a table's columns, and a function that reads some of them: read(columns, texts, codes)."""
    return open_parquet(path, note) if is_parquet(path) else open_csv(path, args.decimal or ".", note)


# -------------------------------------------------------------------------------------------------------- CSV


def open_csv(path, decimal, note):
    import pandas

    first = {"header": None, "nrows": 1, "dtype": str, "keep_default_na": False}
    separators = "\t" if extension(path) == ".tsv" else ",;\t"
    rows = {separator: pandas.read_csv(path, sep=separator, **first) for separator in separators}
    separator = max(rows, key=lambda x: rows[x].shape[1])
    if (line := str(rows[separator].iloc[0, 0])).lower().startswith("sep="):
        raise DataError(f"its first line, {line!r}, is for spreadsheets only: remove it")
    if rows[separator].shape[1] == 1:
        marks = "tabs" if extension(path) == ".tsv" else "commas, semicolons or tabs"
        raise DataError(f"its first line, {textwrap.shorten(line, 80)!r}, has one column: separate columns by {marks}")
    if separator != separators[0]:
        note(f"The columns are separated by {'semicolons' if separator == ';' else 'tabs'}.")
    names = [name or f"Unnamed: {i}" for i, name in enumerate(rows[separator].iloc[0])]  # as pandas names them
    return names, lambda *columns: read_csv(path, separator, decimal, note, *columns)


def read_csv(path, separator, decimal, note, columns, texts, codes):
    """Returns some columns of a CSV file, in which only an empty field is empty; `texts` of them as they stand there.
    The other columns are read too, since pandas lets a row that is too long pass if it reads only some. Raises
    DataError for leading zeros in `codes`."""
    import pandas

    options = {"sep": separator, "decimal": decimal, "index_col": False, "dtype": dict.fromkeys(texts, str)}
    options |= {"keep_default_na": False, "na_values": [""], "float_precision": "round_trip"}
    with warnings.catch_warnings():
        for kind in (pandas.errors.DtypeWarning, pandas.errors.ParserWarning):
            warnings.simplefilter("error", kind)
        try:
            table = pandas.read_csv(path, **options)
        except pandas.errors.DtypeWarning:  # parts of a column have numbers, others texts
            table = pandas.read_csv(path, low_memory=False, **options)
        except pandas.errors.ParserWarning as error:
            cure = "put numbers with commas in quotes"
            raise DataError(f"its rows have more fields than its first line: {cure}") from error
        except pandas.errors.ParserError as error:
            if "Calling read(nbytes)" in str(error):  # pandas makes this of Ctrl-C
                raise KeyboardInterrupt from error
            raise
    if (empty := table.iloc[:, -1].isna().to_numpy()).any():
        rows = f"{empty.sum():,} of {len(empty):,} rows, first in row {empty.argmax()} (from 0)"
        note(f"The last column, {table.columns[-1]}, is empty in {rows}: check that such rows do not lack a field.")
    whole = [name for name in codes if pandas.api.types.is_integer_dtype(table[name])]
    if whole:
        written = pandas.read_csv(path, **options | {"dtype": str, "usecols": whole})
        for name in whole:
            if (zeros := written[name].str.match(r"[+-]?0\d").to_numpy(bool)).any():
                row = zeros.argmax()
                cure = "for a code, put a letter before it; for a number, remove the zeros"
                raise DataError(
                    f"column {name} has leading zeros, {written[name][row]!r} in row {row} (from 0): {cure}"
                )
    return table[columns]


# ---------------------------------------------------------------------------------------------------- Parquet


def find_parts(path):
    """Returns the Parquet files of a folder, file 2 before file 10, and what else is there. In LeRobot's layout they
    are in its folder `data`. What begins with `_` or `.` is skipped, as Spark's _SUCCESS."""

    def natural(part):
        pieces = re.split(r"(\d+)", part.relative_to(path).as_posix())
        return [int(x) if x.isdecimal() else x for x in pieces]

    if (path / "meta" / "info.json").exists():
        path = path / "data"
    files = [x for x in path.rglob("*") if x.is_file()]
    files = [x for x in files if not any(name.startswith(("_", ".")) for name in x.relative_to(path).parts)]
    parts = [x for x in files if is_parquet(x)]
    return sorted(parts, key=natural), sorted({*files} - {*parts})


def hive_keys(part, folder):
    """The columns that stand in the names of folders, as in `country=DE/part-0.parquet`."""
    pairs = [name.split("=", 1) for name in part.relative_to(folder).parts[:-1] if "=" in name]
    values = {key: urllib.parse.unquote(value) for key, value in pairs}
    return {key: None if value == "__HIVE_DEFAULT_PARTITION__" else value for key, value in values.items()}


@contextlib.contextmanager
def opened(part):
    """A Parquet file. Raises DataError where it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(part) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{part.name} is damaged or not a Parquet file: {error}") from error


def open_parquet(path, note):
    parts, others = find_parts(path) if path.is_dir() else ([path], [])
    if not parts:
        raise DataError("the folder holds no Parquet files (.parquet); name a CSV file itself")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install -r requirements-extra.txt, or store it as CSV") from error
    if path.is_dir():
        passed = f"; {len(others):,} of other kinds skipped, such as {others[0].name}" if others else ""
        ends = " to ".join(dict.fromkeys(str(part.relative_to(path)) for part in (parts[0], parts[-1])))
        note(f"Parquet files of the folder: {len(parts):,}, {ends}{passed}.")
    keys = [hive_keys(part, path) if path.is_dir() else {} for part in parts]
    names, row = None, {}
    for part, key in zip(parts, keys):
        with opened(part) as file:
            found = [name for name in file.schema_arrow.names if not re.fullmatch(PANDAS_INDEX, name)] + [*key]
            if not row and file.metadata.num_rows:
                row = next(file.iter_batches(batch_size=1)).to_pylist()[0]
        names = names or found
        if sorted(found) != sorted(names):
            changes = [("lacks", {*names} - {*found}), ("adds", {*found} - {*names})]
            words = " and ".join(f"{verb} {', '.join(sorted(some))}" for verb, some in changes if some)
            raise DataError(f"{part.relative_to(path)} differs from {parts[0].relative_to(path)}: it {words}")
    places = {name: places_of(name, row.get(name)) for name in names}
    places = {name: some if len(some) <= MAX_PLACES else [name] for name, some in places.items()}
    bases = {place: name for name, some in places.items() for place in some}

    def read(columns, *_):
        wanted = dict.fromkeys(bases[column] for column in columns)
        found = {}
        for name, values in read_parts(parts, keys, wanted).items():
            found |= spread(name, values) if places[name] != [name] else {name: values}
        return pyarrow.table(found).to_pandas(ignore_metadata=True)[columns]

    labels = [place for name in names for place in places[name]]
    return labels, read


def places_of(name, value):
    """The names of the numbers of a list, which may hold lists; the name alone for other values."""
    if not isinstance(value, list) or not value or isinstance(value[0], tuple):  # a map is a list of tuples
        return [name]
    return [place for i, part in enumerate(value) for place in places_of(f"{name}[{i}]", part)]


def read_parts(parts, keys, wanted):
    """Returns some columns of Parquet files, one after the other, as Arrow's arrays."""
    import pyarrow

    tables = []
    for part, key in zip(parts, keys):
        with opened(part) as file:
            table, n = file.read(columns=[name for name in wanted if name not in key]), file.metadata.num_rows
        for name in (name for name in wanted if name in key):
            value = pyarrow.scalar(key[name], pyarrow.string())
            table = table.append_column(name, pyarrow.repeat(value, n))
        tables.append(table.select([*wanted]))
    try:
        table = pyarrow.concat_tables(tables, promote_options="permissive")  # refuses what would change a number
    except pyarrow.ArrowException as error:
        raise DataError(f"the types of a column differ between the files: {error}") from error
    columns = {}
    for name in wanted:
        values = table[name]
        if isinstance(values.type, pyarrow.BaseExtensionType) and pyarrow.types.is_nested(values.type.storage_type):
            values = values.cast(values.type.storage_type)
        whole = name in keys[0] and all(re.fullmatch(r"-?[1-9]\d{0,17}|0", key[name] or "") for key in keys)
        columns[name] = values.cast(pyarrow.int64()) if whole else values
    return columns


def spread(name, values):
    """A column of lists of one length, an Arrow array, as columns by place. Raises DataError for another length."""
    import pyarrow
    import pyarrow.compute

    kinds = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(is_kind(values.type) for is_kind in kinds):
        return {name: values}
    if values.null_count:
        refuse_empty(name, values.is_null().to_numpy())
    lengths = pyarrow.compute.list_value_length(values).to_numpy()
    if (other := lengths != lengths[0]).any():
        row = other.argmax()
        raise DataError(
            f"column {name} has lists of different lengths, {lengths[0]:g} in row 0 and {lengths[row]:g} in row {row} "
            "(from 0): a row is one step, with lists of one length"
        )
    n = int(lengths[0])
    flat, columns = pyarrow.compute.list_flatten(values), {}
    for i in range(n):
        columns |= spread(f"{name}[{i}]", flat.take(pyarrow.array(np.arange(i, len(flat), n))))
    return columns
