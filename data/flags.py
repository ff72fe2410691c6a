"""
The command line of train.py and of the prepare.py scripts: the fields of a dataclass, as --name=value.

    @dataclass
    class Config:
        k: int = flag(1, "experts per token", least=1)

    given = parse(["--k=2"], Config)
    check(given, Config)
    cfg = Config(**given)
"""

import dataclasses
import difflib
import sys

WORDS = {"true": True, "1": True, "false": False, "0": False}


def flag(default, text="", least=None, most=None, one_of=None, heading=None):
    """A field: its default, what --help says, the values it takes (ends included), the heading above it."""
    about = dict(text=text, least=least, most=most, one_of=one_of, heading=heading)
    return dataclasses.field(default=default, metadata=about)


def closest(word, words):
    """ " (did you mean ...?)", or nothing."""
    hit = difflib.get_close_matches(word, words, 1)
    return f" (did you mean {hit[0]}?)" if hit else ""


def parse(argv, Config):
    """["--name=value", ...] -> {name: value} of what is given, with the types of the fields. ValueError, one line, for
    anything else."""
    fields, given = {f.name: f for f in dataclasses.fields(Config)}, {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in fields:
            texts = {f.name: f.metadata["text"].split("; ") for f in fields.values() if f.type is str}
            meant = [known for known in texts if name and name in texts[known]]  # resume: of init_from
            hint = f" (did you mean --{meant[0]}={name}?)" if meant else closest(name, fields)
            raise ValueError(f"unknown argument {arg}{hint}; flags look like --name=value; see --help")
        kind = fields[name].type
        if not equals and kind is not bool:
            raise ValueError(f"--{name} needs a value: --{name}=VALUE ({kind.__name__}), with = and no space")
        text = text if equals else "true"  # a bare --flag
        try:
            given[name] = WORDS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ValueError(
                f"--{name}={text} is not of type {kind.__name__}; the default is {fields[name].default!r}"
            ) from None
    return given


def check(values, Config):
    """ValueError, one line, for a value among {name: value} that its field cannot have."""
    for f in dataclasses.fields(Config):
        if f.name not in values:
            continue
        value, least, most, one_of = values[f.name], *(f.metadata[key] for key in ("least", "most", "one_of"))
        if type(value) is not f.type and (type(value), f.type) != (int, float):
            raise ValueError(f"{f.name}={value!r}, from a file, is not of type {f.type.__name__}")
        if f.name == "out_dir" and not value:
            raise ValueError("--out_dir= is empty: name a folder")
        if one_of and value not in one_of:
            raise ValueError(
                f"--{f.name}={value} is unknown{closest(value, one_of)}; choose from {', '.join(filter(None, one_of))}"
            )
        if f.type is float and not abs(value) <= sys.float_info.max:  # nor NaN
            raise ValueError(f"--{f.name}={value} must be a finite number")
        if least is not None and value < least or most is not None and value > most:
            allowed = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"--{f.name}={value} must be {allowed}")


def help_text(manual, Config, others=None):
    """The manual, and every field with its default; others: {name: {field: default}} where a default depends on it."""
    lines = [manual.strip()]
    for f in dataclasses.fields(Config):
        if f.metadata["heading"]:
            lines.append(f"\n{f.metadata['heading']}")
        lines.append((f"  --{f.name}={f.default}".ljust(34) + f.metadata["text"]).rstrip())
    if others:
        lines.append("\nOther defaults")
        lines += [f"  {name}: " + " ".join(f"--{k}={v}" for k, v in also.items()) for name, also in others.items()]
    return "\n".join(lines)
