"""Tables for import_data.py: text and dates become numbers, and an encoding says how. Also what HDF5 files share: the
recording that both become, and the checks of its numbers."""

import fnmatch
import math
import os
import re
import textwrap
import warnings
from dataclasses import dataclass, field

import numpy as np
from common import DataError
from import_files import is_parquet, open_table, refuse_empty

LARGEST = 1e15  # beyond it squares overflow float32
MAX_CATEGORIES = 1000  # of a text column
# A text that people read as a number, with signs and units that pandas does not.
NUMBER = r"[+\-\u2212€$£]?\s?(?:\d+|\d{1,3}(?:[.,' \u00a0\u202f]\d{3})+)(?:[.,]\d*)?\s?[%€$£]?"
ZONE = r"[T ]\d.*(?:Z|[+-]\d\d(?::?\d\d)?)$"  # a time that ends with a time zone


@dataclass
class Recording:
    """Steps in order, episode after episode. A column that is not known is None."""

    observations: np.ndarray  # [n, O]
    actions: np.ndarray  # [n, A], int64 or float64, in the units of the source
    rewards: np.ndarray  # [n]
    terminals: np.ndarray  # [n], the next state is terminal
    timeouts: np.ndarray = None  # [n], the episode ends here all the same
    next_observations: np.ndarray = None  # [n, O]
    action_low: np.ndarray = None  # [A], in the units of the source
    action_high: np.ndarray = None  # [A]
    rows: np.ndarray = None  # [n], the row of the table that each step comes from
    encoding: dict = None  # of a table; its actions are completed with their bounds
    masks: np.ndarray = None  # [n, actions], whether each action is allowed, in the order of encoding["masks"]
    propensities: np.ndarray = None  # [n], how probable the logged action was
    notes: list = field(default_factory=list)  # sentences for the user and the metadata

    def note(self, text):
        print(textwrap.shorten(text, 600, placeholder=" ..."))
        self.notes.append(text)


def plural(n, word):
    return f"{n:,} {word}{'s' * bool(n != 1)}"


def show(text):
    """A text, in quotes if spaces around it would not be seen."""
    return repr(text) if isinstance(text, str) and text != text.strip() else str(text)


def shorten(items):
    """The first of the items, with commas."""
    return textwrap.shorten(", ".join(map(str, items)), 300, placeholder=" ...")


# --------------------------------------------------------------------------------------------------- numbers


def check_numbers(values, column):
    """Raises DataError for NaN, infinity and numbers beyond LARGEST."""
    if values.size and not (values.min() > -LARGEST and values.max() < LARGEST):
        row, *place = np.argwhere(~(np.abs(values) < LARGEST))[0].tolist()
        column += "".join(f"[{i}]" for i in place)
        cure = "correct or remove such rows"
        if np.isfinite(values[row, *place]):
            cure = f"numbers reach {LARGEST:g} at most, so use a larger unit or subtract a constant"
        raise DataError(f"{column} is {values[row, *place]:g} in row {row} (from 0): {cure}")


def check_flags(values, column):
    if (bad := ~np.isin(values, (0, 1))).any():
        row = bad.argmax()
        raise DataError(f"{column} is {values[row]} in row {row} (from 0): it must be 0 or 1")


def is_coarse(low, high, share=1e-3, least=1e-5):
    """Whether float32 has few numbers between these two, for the distance that they are from 0: its steps are more than
    this share of a range of at least `least`. By default what the scripts refuse."""
    spread, step = high - low, float(np.spacing(np.float32(max(abs(low), abs(high)))))
    return spread > 0 and (step > share * spread and spread > least or step >= 1 and step > 1.5e-7 * spread)


def middle(low, high):
    """A round number near the middle between two."""
    return float(round((low + high) / 2, -math.floor(math.log10(high - low))))


def is_changed(values, *limits):
    """Whether float32 changes numbers [n] that lie in a small range for their distance from 0."""
    return is_coarse(values.min().item(), values.max().item(), *limits) and bool((np.float32(values) != values).any())


def is_merged(values, stored):
    """Whether float32 makes some of these whole numbers [n] equal."""
    if np.abs(stored).max() < 2**24 or (values != np.rint(values)).any():
        return False
    return len(np.unique(np.float32(stored))) < len(np.unique(values))


def refuse_precision(column, low, high):
    cure = f"subtract {middle(low, high):.15g} from it"
    raise DataError(
        f"{column} has numbers from {low:.15g} to {high:.15g}, for which float32 has too few digits: {cure}"
    )


def check_precision(values, column):
    """Raises DataError for a column of values [n, ...] whose numbers float32 cannot hold apart."""
    if values.dtype != np.float32:
        for place in np.ndindex(values.shape[1:]):
            if is_changed(part := values[:, *place]) or is_merged(part, part):
                name = column + "".join(f"[{i}]" for i in place)
                refuse_precision(name, part.min().item(), part.max().item())


# ------------------------------------------------------------------------------------------------------ files


MANY = ("observations", "actions", "mask")  # roles that patterns may fill
TOLD = ("actions", "reward", "terminal", "timeout", "propensity")  # what nobody knows when the action is chosen
DONE = re.compile("dones?$", re.IGNORECASE)  # names of flags that are often true at time-outs too
WORDS = {"terminal": ("all", "none"), "timeout": ("none",)}  # that stand in place of a column


def pick(patterns, columns, role, taken=()):
    """The columns that names and glob patterns stand for, in their order; a pattern skips those that are taken, a dict
    with the option of each. `x` stands for `x[0]`, `x[1]`, ... too."""
    picked = []
    for pattern in patterns:
        found = [pattern] if pattern in columns else [x for x in columns if x.startswith(f"{pattern}[")]
        if not found and role in MANY:
            fits = fnmatch.filter(columns, pattern)
            found = [x for x in fits if x not in taken]
            if fits and not found:
                options = ", ".join(dict.fromkeys(f"--{taken[x]}" for x in fits))
                cure = "a pattern skips them, so name them in full to use them twice"
                raise DataError(f"--{role} {pattern}: its columns are taken by {options}: {cure}")
        if not found:
            has = shorten(map(repr, columns))
            raise DataError(f"--{role} {pattern}: there is no such column; the table has {has}")
        if len({*found}) > 1 and role not in MANY:
            raise DataError(f"--{role} {pattern}: it takes one column, such as {found[0]}, not {len(found)}")
        picked += found
    if double := [name for name in picked if columns.count(name) > 1]:
        raise DataError(f"--{role}: several columns are named {double[0]}")
    return list(dict.fromkeys(picked))


def pick_all(args, names, like):
    """The columns of each role that the options name, a list each; those of --like where it knows them."""
    single = {"step": args.step, "reward": args.reward or args.cost, "propensity": args.propensity}
    single |= {"terminal": args.terminal, "timeout": args.timeout}
    options = {"reward": "cost"} if args.cost else {}
    columns = {"episode": [x for name in dict.fromkeys(args.episode or ()) for x in pick([name], names, "episode")]}
    for role, name in single.items():
        if name in WORDS.get(role, ()):
            if name in names:
                raise DataError(f"`{name}` is a word of --{role} and also a column: rename the column")
        elif name is not None:
            columns[role] = pick([name], names, options.get(role, role))
    taken = {name: options.get(role, role) for role in columns for name in columns[role]}
    if args.mask or like and "masks" in like["encoding"]:
        columns["mask"] = pick_columns("mask", args.mask, args, names, taken, like)
        taken |= dict.fromkeys(columns["mask"], "mask")
    columns["actions"] = pick_columns("actions", args.actions, args, names, taken, like)
    taken |= dict.fromkeys(columns["actions"], "actions")
    columns["observations"] = pick_columns("observations", args.observations, args, names, taken, like)
    return columns


def pick_columns(role, patterns, args, names, taken, like):
    """The columns of a role that takes patterns: the options' ones, or those of the dataset of --like."""
    picked = pick(patterns, names, role, taken) if patterns else None
    if like is None:
        return picked
    encoding = like["encoding"]
    wanted = encoding.get("masks", []) if role == "mask" else [entry["name"] for entry in encoding[role]]
    if picked is not None and {*picked} != {*wanted}:
        raise DataError(f"--{role} names {shorten(picked)}; those of {args.like} are {shorten(wanted) or 'none'}")
    if missing := [name for name in wanted if name not in names]:
        what = "masks" if role == "mask" else role
        raise DataError(f"it lacks {shorten(missing)}, {what} of {args.like}; it has {shorten(names)}")
    return pick(wanted, names, role)


def read_table(path, args, like=None):
    """A Recording of a table. like: the metadata of a dataset whose encoding is used."""
    import pandas

    notes = []
    try:
        names, read = open_table(path, args, notes.append)
        columns = pick_all(args, names, like)
        others = {name for role in columns for name in columns[role] if role != "episode"}
        codes = [*dict.fromkeys(columns["observations"] + columns["actions"])]
        texts = {*columns["episode"]} - others
        table = read(list(dict.fromkeys(name for role in columns for name in columns[role])), texts, codes)
    except (DataError, MemoryError):
        raise
    except UnicodeError as error:
        raise DataError(f"it is not UTF-8 text ({error}): save it as CSV UTF-8") from error
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise DataError(f"it is damaged or not a table: {error}") from error
    told = {name for role in TOLD for name in columns.get(role, ())}
    if known := [name for name in columns["observations"] if name in told]:
        raise DataError(
            f"column {known[0]} cannot be an observation: it is an action, the reward, a flag or a propensity"
        )
    for name in table:
        if name in columns["episode"] and pandas.api.types.infer_dtype(table[name]) == "mixed":
            raise DataError(f"column {name} holds lists or records: store text or numbers")
        if (empty := table[name].isna().to_numpy()).any():
            refuse_empty(name, empty)
    if not len(table):
        raise DataError("it has no rows")
    return order_table(table, columns, Reader(path, args, like), args, notes)


def order_table(table, columns, reader, args, notes):
    """A Recording of the rows, sorted by episode, in the order of their first rows, and by step."""
    observations, observation_entries = reader.observations(table[columns["observations"]])
    actions, action_entries = reader.actions(table[columns["actions"]])
    rewards = reader.numbers_alone(table[columns["reward"][0]], "rewards")
    flags = {role: reader.flags(table[columns[role][0]]) for role in ("terminal", "timeout") if role in columns}
    if "step" in columns:
        steps, span = reader.steps(table[columns["step"][0]])
    else:
        steps, span = np.arange(len(table)), "the file's order"
    episodes = number_episodes(table[columns["episode"]])
    order = np.lexsort((steps, episodes))
    episodes, steps = episodes[order], steps[order]
    flags = {role: values[order] for role, values in flags.items()}
    terminals = flags.get("terminal", np.full(len(table), args.terminal == "all"))
    timeouts = flags.get("timeout", np.zeros(len(table), bool))
    if (both := terminals & timeouts).any():
        terminals, text = tell_both(both, terminals, args)
        notes.append(text)
    signed = np.float32(0 - rewards if args.cost else rewards)[order]
    recording = Recording(observations[order], actions[order], signed, terminals, rows=order)
    recording.encoding = {"observations": observation_entries, "actions": action_entries}
    if reader.like:
        recording.action_low, recording.action_high = reader.bounds()
    if "mask" in columns:
        masks = np.stack([reader.flags(table[name]) for name in columns["mask"]], axis=1)[order]
        match_masks(recording, columns["mask"], masks, args, reader)
    if "propensity" in columns:
        recording.propensities = reader.propensities(table[columns["propensity"][0]])[order]
    for text in notes + reader.notes:
        recording.note(text)
    if args.cost:
        recording.note(f"Rewards are minus {args.cost}.")
    goes_on = find_ends(recording, columns, (episodes, steps, timeouts), span, args)
    recording.timeouts = (~goes_on | timeouts) & ~terminals
    tell_encoding(recording, observations.shape[1])
    return recording


def number_episodes(table):
    """The number of each row's episode [n], in the order of their first rows. Rows of an episode are equal in all
    columns."""
    import pandas

    numbers = np.zeros(len(table), np.int64)
    for name in table:
        codes, uniques = pandas.factorize(table[name])
        numbers = pandas.factorize(numbers * len(uniques) + codes)[0]
    return numbers


def tell_both(both, terminals, args):
    """The terminals, where rows are flagged by both --terminal and --timeout [n], and a sentence about it."""
    told = f"{plural(both.sum(), 'row')} flagged by both {args.terminal} and {args.timeout}"
    if DONE.search(args.terminal):
        return terminals & ~both, f"{told}: taken as time-outs, which such a flag includes."
    return terminals, f"{told}: taken as terminal."


def find_ends(recording, columns, ordered, span, args):
    """Flags of the rows whose episode goes on in the next row [n]; notes where episodes end."""
    (episodes, steps, timeouts), by = ordered, ", ".join(columns["episode"])
    goes_on, rows = np.append(episodes[1:] == episodes[:-1], False), plural(len(steps), "row")
    if args.terminal == "all":
        order = ", ".join(columns["episode"] + columns.get("step", []))
        recording.note(f"{rows}, each an episode of its own (--terminal all), in the order of {order or 'the file'}.")
        return np.zeros(len(steps), bool)
    if args.max_gap:
        distances = np.append(steps[1:] - steps[:-1], steps[:1] - steps[:1])
        gaps = goes_on & (distances > read_gap(args.max_gap, distances))
        goes_on &= ~gaps
        recording.note(f"Episodes end at {plural(gaps.sum(), 'gap')} above {args.max_gap}.")
    flagged = recording.terminals | timeouts
    if early := (recording.terminals & goes_on).sum() if by else 0:
        recording.note(f"{plural(early, 'terminal row')} before the last row of an episode, which is split there.")
    marks = " or ".join(columns[role][0] for role in ("terminal", "timeout") if role in columns)
    how = f" by {by}" if by else f" ended by {marks}" if marks else ", none terminal"
    ends = ~goes_on if by else ~goes_on | flagged
    recording.note(f"{rows}, {plural(ends.sum(), 'episode')}{how}; steps: {span}.")
    goes_on &= ~flagged
    if "step" in columns:
        refuse_ties(steps, goes_on[:-1], columns)
        tell_distances(steps, goes_on[:-1], recording.note, args.max_gap)
    return goes_on


def read_gap(text, distances):
    """The longest distance between two steps of an episode, as a number or a duration."""
    import pandas

    try:
        gap = float(text)
    except ValueError:
        gap = None
    if distances.dtype.kind != "m":
        if gap is None or not gap > 0:
            raise DataError(f"--max_gap {text}: the steps are numbers, so give a number above 0")
        return gap
    try:
        duration = pandas.Timedelta(text) if gap is None else pandas.NaT
    except ValueError:
        duration = pandas.NaT
    if not duration > pandas.Timedelta(0):
        raise DataError(f"--max_gap {text}: the steps are times, so give a duration such as 30min, 2h or 1d")
    return duration.to_timedelta64()


# ------------------------------------------------------------------------------------------------------ masks


def mask_parts(names, patterns, whole):
    """The part of each mask's name that tells its action: what `*` stands for, or what follows the beginning that all
    names share. whole: the actions are numbers, which are not split: in `m10`, `m1*` stands for 10."""
    start = os.path.commonprefix(names)
    start = re.sub(r"[^\W_]*\[?$", "", start) if len(names) > 1 else ""
    parts = [name[len(start) :] for name in names]
    for pattern in patterns:
        if pattern.count("*") == 1 and pattern not in names:
            before, after = pattern.split("*")
            if whole:
                before, after = before.rstrip("0123456789"), after.lstrip("0123456789")
            for i, name in enumerate(names):
                if name.startswith(before) and name.endswith(after):
                    parts[i] = name[len(before) : len(name) - len(after)]
    return parts


def list_places(names):
    """The places of columns that are one whole list, in the order of the names; None for other columns."""
    places = [re.fullmatch(r"(.*)\[(\d+)\]", name) for name in names]
    if not all(places) or len({place[1] for place in places}) > 1:
        return None
    numbers = [int(place[2]) for place in places]
    if sorted(numbers) != [*range(len(names))]:
        raise DataError(f"--mask names some places of a list, {shorten(names)}: name all of {places[0][1]}, from 0 on")
    return numbers


def match_masks(recording, names, masks, args, reader):
    """Puts the mask columns [n, k] into the order of the actions, which are then known from their names or numbers. The
    places of a list, and columns without numbers, are in the order of whole-number actions."""
    (entry, *others), recording.masks = recording.encoding["actions"], masks
    recording.encoding["masks"] = names
    if others:
        raise DataError("--mask is for one column of discrete actions: the dataset has several")
    if reader.like:
        return
    values, texts = recording.actions[:, 0], entry.get("values")
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise DataError(f"--mask is for discrete actions: column {entry['name']} holds real numbers")
    recording.actions = recording.actions.astype(np.int64)
    known, places = texts or np.unique(values).astype(np.int64).tolist(), None if texts else list_places(names)
    parts = names if {*known} <= {*names} else mask_parts(names, args.mask, whole=not texts)
    if places or not texts and not re.search(r"\d", "".join(parts)):
        order = sorted(range(len(names)), key=lambda i: places[i]) if places else range(len(names))
        count_actions(recording, entry, len(names), args)
    else:
        parts = parts if texts else [find_number(*x, entry["name"]) for x in zip(names, parts)]
        if twice := [part for part in parts if parts.count(part) > 1]:
            alike = [name for name, part in zip(names, parts) if part == twice[0]]
            raise DataError(f"--mask has several columns for action {twice[0]}: {shorten(alike)}")
        if missing := [x for x in known if str(x) not in parts]:
            refuse_names(names, args.mask, parts, missing, known, entry["name"])
        order = name_actions(recording, entry, parts, known, args)
    recording.masks, recording.encoding["masks"] = masks[:, [*order]], [names[i] for i in order]


def find_number(name, part, column):
    """The number of an action, from the part of its mask's name."""
    numbers = [part] if re.fullmatch(r"-?\d+", part) else re.findall(r"\d+", part)
    if len(numbers) != 1 or len(numbers[0]) > 15:
        raise DataError(
            f"--mask: {column} holds whole numbers, and {name} does not tell which one it is for: use a pattern whose "
            "* stands for the number"
        )
    return str(int(numbers[0]))


def refuse_names(names, patterns, parts, missing, known, column):
    """Raises DataError for actions without a mask, with the pattern that would find them, if there is one."""
    start, cure = os.path.commonprefix(names), ""
    if isinstance(known[0], (str, bool)):
        cure = ": the mask of a text needs that text in its name, at the * of a pattern"
        for i in range(1, (len(start) + 1) * (len(missing) == len(known))):
            if {name[i:] for name in names} & {*known}:
                cure = f": give --mask '{start[:i]}*'"
    raise DataError(
        f"--mask {' '.join(patterns)}: action {show(missing[0])} of {column} has no column; the columns stand for "
        f"{shorten(map(show, parts))}{cure}"
    )


def count_actions(recording, entry, n, args):
    """Takes n actions from the lowest on: their masks have neither names nor numbers, so that only their order tells
    which is for which."""
    if args.action_low is not None:
        return
    low, high = recording.actions.min().item(), recording.actions.max().item()
    if high - low + 1 != n:
        raise DataError(
            f"--mask {' '.join(args.mask)}: {plural(n, 'column')} without the numbers of actions, but {entry['name']} "
            f"runs from {low} to {high}: give --action_low and --action_high, or masks with the numbers in their names"
        )
    recording.action_low, recording.action_high = np.array([low]), np.array([high])


def name_actions(recording, entry, parts, known, args):
    """Takes the actions from the names of their masks, so that one that nobody took is known. Returns the order of the
    columns."""
    whole = isinstance(known[0], int) and not isinstance(known[0], bool)
    if isinstance(known[0], bool) and len(parts) > 2:
        raise DataError(f"--mask has {len(parts)} columns for the truth values of {entry['name']}")
    order = sorted(range(len(parts)), key=lambda i: int(parts[i]) if whole else parts[i])
    values = [int(parts[i]) if whole else parts[i] for i in order]
    if isinstance(known[0], bool):
        values = [value == "True" for value in values]
    low, high = (values[0], values[-1]) if whole else (0, len(values) - 1)
    if whole and high - low >= len(values):  # with holes: numbered
        recording.actions = np.searchsorted(values, recording.actions)
        low, high, entry["values"] = 0, len(values) - 1, values
    elif not whole:
        recording.actions = np.array([values.index(x) for x in known])[recording.actions]
        entry["values"] = values
    if args.action_low is not None and (args.action_low, args.action_high) != ([low], [high]):
        cure = "leave out --action_low and --action_high"
        raise DataError(f"the names of the masks tell the actions, {shorten(values)}: {cure}")
    recording.action_low, recording.action_high = np.array([low]), np.array([high])
    if idle := [value for value in values if value not in known]:
        recording.note(
            f"Actions of {entry['name']} that no row took, known from the masks: {shorten(map(show, idle))}."
        )
    return order


def check_choices(recording, low, high):
    """Raises DataError for masks or propensities that do not fit the actions, whose bounds as stored are [A] each."""
    discrete = len(low) == 1 and recording.actions.dtype.kind == "i"
    for option, values in (("mask", recording.masks), ("propensity", recording.propensities)):
        if values is not None and not discrete:
            raise DataError(f"--{option} is for one column of discrete actions")
    if recording.masks is None:
        return
    masks, names, (entry,) = recording.masks, recording.encoding["masks"], recording.encoding["actions"]
    if len(names) != (n := len(entry["values"])):
        raise DataError(
            f"--mask has {plural(len(names), 'column')}, but {entry['name']} has {plural(n, 'action')}, "
            f"{shorten(entry['values'])}: it needs one column per action"
        )
    recording.note(f"Masks: {shorten(f'{x} is for {show(y)}' for x, y in zip(names, entry['values']))}.")
    allowed = masks[np.arange(len(masks)), recording.actions[:, 0] - low[0]]
    for bad, words in ((~masks.any(axis=1), "the masks allow no action"), (~allowed, "")):
        if bad.any():
            i = bad.argmax()
            number = recording.actions[i, 0] - low[0]
            words = words or f"the action is {show(entry['values'][number])}, which {names[number]} forbids"
            raise DataError(f"{words} in row {recording.rows[i]} (from 0): correct or remove such rows")
    recording.note(f"On average {masks.sum(axis=1).mean():.4g} of {len(names)} actions are allowed.")


def tell_encoding(recording, size):
    entries = recording.encoding["observations"]
    labels = [
        f"{x['name']}={show(value)}" if "values" in x else x["name"] for x in entries for value in x.get("values", "-")
    ]
    recording.note(f"Observations ({size}): {', '.join(labels)}.")
    for entry in entries:
        if entry.get("offset"):
            recording.note(
                f"{entry['name']} is stored minus {entry['offset']:.15g}: float32 has too few digits for it."
            )


# ---------------------------------------------------------------------------------------------------- columns


class Reader:
    """Turns columns into numbers, and says how in the entries of an encoding. With --like it follows another one's."""

    def __init__(self, path, args, like):
        self.csv, self.decimal = not is_parquet(path), args.decimal or "."
        self.day_first = None if args.day_first is None else args.day_first == "True"
        self.max_gap, self.like, self.like_id, self.unseen, self.notes = args.max_gap, like, args.like, args.unseen, []
        # An environment does not know an offset, so only what could not be stored gets one there.
        self.limits = () if args.eval_env not in (None, "none") else (1e-5, 1e-6)

    def known(self, role, name):
        """The entry of a column in the other dataset's encoding, if there is one."""
        return next(x for x in self.like["encoding"][role] if x["name"] == name) if self.like else {}

    def column(self, column):
        """Numbers [n], and None; for text and truth values the index of each category, and the categories."""
        import pandas

        name, kind = f"column {column.name}", pandas.api.types.infer_dtype(column)
        if kind == "decimal":
            column = column.astype(float)
        if pandas.api.types.is_numeric_dtype(column) and kind != "boolean":
            check_numbers(column.to_numpy(np.float64), name)
            return column.to_numpy(np.int64 if kind == "integer" else np.float64), None
        if kind in ("mixed", "bytes"):
            raise DataError(f"{name} holds records, images, or lists that are empty or long: leave it out")
        if kind not in ("string", "boolean", "categorical"):
            raise DataError(
                f"{name} holds {kind}: store text or numbers (for times, such as the hours since the episode began)"
            )
        codes, texts = pandas.factorize(column.astype(str), sort=True)
        texts = pandas.Series(texts, dtype=str)
        numbers = self.check_texts(name, codes, texts)
        if not numbers and pandas.to_datetime(texts, format="ISO8601", errors="coerce", utc=True).notna().all():
            raise DataError(f"{name} holds times: store numbers, such as the hours since the episode began")
        if len(texts) > MAX_CATEGORIES:
            raise DataError(f"{name} has {len(texts):,} different texts: leave it out, or store numbers")
        return codes.astype(np.int64), texts.tolist()

    def check_texts(self, name, codes, texts):
        """Whether all texts are numbers, as they may be in a Parquet file. Raises DataError if some are, or look so."""
        import pandas

        numbers = pandas.to_numeric(texts, errors="coerce").notna().to_numpy()
        alike = texts.str.fullmatch(NUMBER).to_numpy(bool)
        if not (numbers | alike).any() or numbers.all() and not self.csv:
            return numbers.all()
        row = 0 if numbers.all() else (~numbers)[codes].argmax()
        text = texts[codes[row]]
        place = f"{text!r} in row {row} (from 0)"
        if not alike[codes[row]]:
            cure = "correct such rows or, if they are categories, put a letter before the numbers"
            raise DataError(f"{name} has text among numbers, {place}: {cure}")
        cure = "numbers have no signs but + and -, no separators of thousands, and at most 15 digits"
        odd = texts[~numbers]
        if len(odd) and odd.str.fullmatch(r"[+-]?\d{1,3}(?:[.,' \u00a0\u202f]\d{3})+").all():
            pass  # --decimal would misread them
        elif self.csv and self.decimal == "." and "," in text:
            cure = f"--decimal , reads decimal commas; {cure}"
        elif self.csv and self.decimal == "," and "." in text:
            cure = f"with --decimal , numbers have no points; {cure}"
        raise DataError(f"{name} holds {place}: {cure}")

    def numbers_alone(self, column, what):
        """Numbers [n] that text and truth values cannot stand for."""
        values, texts = self.column(column)
        if texts:
            raise DataError(f"column {column.name} holds text or truth values: {what} are numbers")
        if what == "rewards":
            check_precision(values, f"column {column.name}")
        return values

    def propensities(self, column):
        values = np.float64(self.numbers_alone(column, "propensities"))
        if (bad := ~((values > 0) & (values <= 1))).any():
            row = bad.argmax()
            raise DataError(
                f"column {column.name} is {values[row]:.10g} in row {row} (from 0): a propensity is the probability of "
                "the logged action, above 0 and at most 1"
            )
        return values

    def flags(self, column):
        values, texts = self.column(column)
        if texts is None:
            check_flags(values, f"column {column.name}")
            return values.astype(bool)
        if not set(texts) <= {"False", "True"}:
            row = (~column.astype(str).isin(["False", "True"])).to_numpy().argmax()
            raise DataError(
                f"column {column.name} is {str(column.iloc[row])!r} in row {row} (from 0): it must be 0 or 1"
            )
        return (np.array(texts) == "True")[values]

    def observations(self, table):
        """Observations [n, O], with text and truth values one-hot, and the entries of the columns."""
        parts, entries = [], []
        for name in table:
            values, texts = self.column(table[name])
            entry = self.known("observations", name)
            if texts is None and "values" not in entry:
                part, entry = self.numbers(name, values, entry.get("offset"))
            elif "offset" in entry:
                raise DataError(f"column {name} holds text; in {self.like_id} it holds numbers")
            else:
                entry = entry or {"name": name, "values": texts}
                part = self.categories(entry, values, texts)
            parts.append(part)
            entries.append(entry)
        return np.concatenate(parts, axis=1), entries

    def numbers(self, name, values, offset):
        """Numbers as they are stored [n, 1], and their entry; less an offset if float32 could not tell them apart."""
        low, high = values.min().item(), values.max().item()
        if offset is None and low == high:
            offset = float(low) if abs(float(np.float32(low)) - low) >= 0.5 else 0.0
        elif offset is None:
            offset = middle(low, high) if is_changed(values, *self.limits) or is_merged(values, values) else 0.0
        stored = values - offset
        constant = low == high and abs(np.float32(stored[0]) - stored[0]) >= 0.5
        if is_changed(stored) or is_merged(values, stored) or constant:
            less = f", minus the offset {offset:.15g} of {self.like_id}" if self.like else ""
            raise DataError(
                f"column {name} runs from {low:.15g} to {high:.15g}{less}, where float32 makes numbers equal: "
                "leave it out, or store coarser numbers"
            )
        return np.float32(stored)[:, None], {"name": name, "offset": offset}

    def categories(self, entry, values, texts):
        """One number per category [n, k], 1 for the row's own."""
        index, unseen = self.places(entry, values, texts)
        if unseen:
            told = f"column {entry['name']} holds {tell_counts(unseen)}, unknown to {self.like_id}"
            if not self.unseen:
                raise DataError(f"{told}: give --unseen other, or remove these rows")
            other = entry["values"].index("other") if "other" in entry["values"] else -1
            index[index < 0] = other
            self.notes.append(f"{told[0].upper()}{told[1:]}: {'other' if other >= 0 else 'zeros'} in their place.")
        k = len(entry["values"])
        return np.eye(k + 1, k, dtype=np.float32)[index]  # its last row, -1, is zeros

    def places(self, entry, values, texts):
        """The index of each row's value among those of the entry, or -1; and the counts of those without."""
        if texts is None:
            uniques, values = np.unique(values, return_inverse=True)
            texts = [str(int(x) if x == int(x) else x) for x in uniques.tolist()]
        known = {str(value): i for i, value in enumerate(entry["values"])}
        index = np.array([known.get(text, -1) for text in texts])
        return index[values], {text: (values == i).sum() for i, text in enumerate(texts) if index[i] < 0}

    def actions(self, table):
        """Actions [n, A], int64 if all columns are integers or categories, and the entries of the columns."""
        import pandas

        columns, entries = [], []
        for name in table:
            values, texts = self.column(table[name])
            named = texts
            if texts and pandas.api.types.is_bool_dtype(table[name]):
                named = [text == "True" for text in texts]
            entry = dict(self.known("actions", name)) or ({"name": name} | ({"values": named} if texts else {}))
            if self.like and "values" in entry:
                values, unseen = self.places(entry, values, texts)
                if unseen:
                    cure = f"remove these rows, or import {self.like_id} again with such an action"
                    raise DataError(f"column {name} holds {tell_counts(unseen)}, unknown to {self.like_id}: {cure}")
                values += entry["low"]
            elif self.like and texts:
                raise DataError(f"column {name} holds text; in {self.like_id} it holds numbers")
            columns.append(np.float64(values) if self.like and "values" not in entry else values)
            entries.append(entry)
        actions = np.stack(columns, axis=1)
        if actions.dtype.kind == "f" and any("values" in entry for entry in entries):
            raise DataError(f"actions {', '.join(table)} mix text and real numbers: scripts take one kind")
        return actions, entries

    def steps(self, column):
        """Numbers or times to sort the rows by, [n], and their range in words."""
        import pandas

        name, kind = f"column {column.name}", pandas.api.types.infer_dtype(column)
        if self.day_first is not None and kind not in ("string", "categorical"):
            raise DataError(f"--day_first is for texts that are dates: {name} holds {kind}")
        if kind in ("string", "categorical"):
            codes, texts = pandas.factorize(column.astype(str))
            texts = pandas.Series(texts)
            if self.check_texts(name, codes, texts):
                column = pandas.to_numeric(texts).iloc[codes]
            else:
                column = read_dates(name, texts, codes, self.day_first, self.max_gap, self.notes).iloc[codes]
        elif kind in ("date", "datetime", "datetime64"):
            try:
                column = pandas.to_datetime(column, utc=True)
            except (TypeError, ValueError) as error:  # such as a time after the year 2262
                raise DataError(f"{name} cannot be read: {error}") from error
        elif kind not in ("integer", "floating", "mixed-integer-float", "decimal", "timedelta64"):
            raise DataError(f"{name} is neither numbers nor times: it holds {kind}")
        if column.dtype.kind == "f" or kind == "decimal":
            column = column.astype(np.float64)
            check_numbers(column.to_numpy(), name)
        span = f"{column.min()} to {column.max()}"
        return (column.dt.tz_localize(None) if column.dtype.kind == "M" else column).to_numpy(), span

    def bounds(self):
        """Lowest and highest actions of the dataset of --like, in the table's units."""
        bounds = [
            (x["low"], x.get("high", x["low"] + len(x.get("values", ())) - 1)) for x in self.like["encoding"]["actions"]
        ]
        return np.array(bounds).T


def tell_counts(counts):
    return shorten(f"{text!r} ({plural(n, 'row')})" for text, n in counts.items())


# ------------------------------------------------------------------------------------------------ steps and dates


def read_dates(name, texts, codes, day_first, max_gap, notes):
    """The times of different texts, in ISO 8601 or else in one format. codes [n]: the text of each row. max_gap: the
    distances between them end episodes."""
    import pandas

    def parse(format):
        return pandas.to_datetime(texts, format=format, errors="coerce", utc=True)

    def first_row(stray):
        """The first row with a text that is astray, in words."""
        row = stray.to_numpy()[codes].argmax()
        return f"{texts[codes[row]]!r} in row {row} (from 0)"

    if (times := parse("ISO8601")).notna().all():
        zoned = texts.str.contains(ZONE)
        if zoned.any() and not zoned.all():
            raise DataError(
                f"{name} has times with and without a time zone, {first_row(zoned)} and {first_row(~zoned)}"
            )
        if day_first is not None:
            raise DataError(f"--day_first is not for dates that begin with the year, as in {name}")
        return times
    with warnings.catch_warnings(action="ignore"):  # about a day that cannot be a month
        formats = [pandas.tseries.api.guess_datetime_format(texts[0], dayfirst=x) for x in (True, False)]
    formats = {x: x.index("%d") < x.index("%m") if x and "%m" in x and "%d" in x else None for x in formats if x}
    formats = {x: is_day_first for x, is_day_first in formats.items() if not (is_day_first and x.startswith("%Y"))}
    read = {format: parse(format) for format, x in formats.items() if day_first is None or x == day_first}
    stray = min((times.isna() for times in read.values()), key=lambda x: x.sum(), default=texts.notna())
    if stray.any():
        cure = "write all as in 2024-01-31 09:30"
        if formats and day_first is not None:
            cure = f"it does not fit --day_first {day_first}"
        raise DataError(f"{name} is neither numbers nor times throughout, {first_row(stray)}: {cure}")
    good = {format: times for format, times in read.items() if times.notna().all()}
    format = next(iter(good))
    reading = {True: "day-first", False: "month-first", None: None}[formats[format]]
    if format.startswith("%Y"):
        reading = None
    if len(good) > 1:
        orders = [times.rank(method="dense") for times in good.values()]
        distances = [times.sort_values().diff().to_numpy()[1:] for times in good.values()]
        what = ""
        if (orders[0] != orders[1]).any():
            what = "orders of the rows"
        elif max_gap and (distances[0] != distances[1]).any():
            what = "distances, which --max_gap compares"
        if what:
            raise DataError(
                f"{name} can be read day-first and month-first, with different {what}, such as {texts[0]!r}: "
                "give --day_first True or --day_first False"
            )
        notes.append(
            f"C{name[1:]} gives the same order day-first and month-first; distances are those of {reading} dates."
        )
    elif reading and day_first is None:
        decisive = max((times.isna() for times in read.values()), key=lambda x: x.sum())
        notes.append(f"C{name[1:]} is read {reading}: {first_row(decisive)} allows no other reading.")
    return good[format]


def refuse_ties(steps, goes_on, columns):
    """Raises DataError if most rows share their step with a neighbour of their episode, as in several series whose rows
    lie between each other. steps [n], in order; goes_on [n - 1]: the next row is of the same episode."""
    alike = goes_on & (steps[1:] == steps[:-1])
    inside, shared = (int((np.append(x, False) | np.append(False, x)).sum()) for x in (goes_on, alike))
    if shared * 2 > inside:
        (step,), more = columns["step"], " too" * bool(columns["episode"])
        raise DataError(
            f"{shared:,} of {plural(inside, 'row')} have the same {step} as a neighbour in their episode: if the table "
            f"holds several series, name the column that tells them apart as --episode{more}; else give a finer "
            "--step, or sort the file and leave out --step"
        )


def tell_distances(steps, goes_on, note, max_gap):
    """Notes equal steps and gaps within episodes. steps [n], in order; goes_on [n - 1]: the next row is of the same."""
    import pandas

    distances = (steps[1:] - steps[:-1])[goes_on]
    if ties := int((distances == distances * 0).sum()):
        note(f"Same step as the row before: {plural(ties, 'row')}, left in the file's order.")
    if len(distances) == ties:
        return
    typical = np.sort(distances)[(ties + len(distances) - 1) // 2]  # a median that is one of them, without ties
    far, words = (distances > typical * 2).sum(), [typical, distances.max()]
    words = [pandas.Timedelta(x) if distances.dtype.kind == "m" else f"{x:.10g}" for x in words]
    note(
        f"Steps are typically {words[0]} apart; {far:,} of {len(distances):,} distances are more than twice that, the "
        f"largest is {words[1]}.{' --max_gap ends episodes at gaps.' * bool(far and not max_gap)}"
    )
