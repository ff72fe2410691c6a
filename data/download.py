"""
What the prepare.py scripts share: where raw files come from, how they are read, the command line.
"""

import dataclasses
import gzip
import hashlib
import http.client
import os
import sys
import urllib.request
import zlib

from data.flags import check, flag, help_text, parse


def fetch(name, url, args, sha256=None):
    """
    The path of the raw file `name`: in args.data_dir if that is given, otherwise downloaded once to
    args.out_dir/download. sha256 (hex) is checked on downloads, for files that never change.
    """
    if args.data_dir:
        path = os.path.join(args.data_dir, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing: --data_dir needs a folder with {name}, from {url}")
        return path
    path = os.path.join(args.out_dir, "download", name)
    if not os.path.exists(path):
        print(f"downloading {url}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.partial"
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (prepare.py)"})
            digest = hashlib.sha256()
            with urllib.request.urlopen(request, timeout=30) as response, open(partial, "wb") as f:
                while block := response.read(1 << 20):
                    digest.update(block)
                    f.write(block)
                whole = response.headers.get("Content-Length")
            size = os.path.getsize(partial)
            if whole and int(whole) != size:
                raise OSError(f"the connection ended after {size:,d} of {int(whole):,d} bytes")
            if sha256 and digest.hexdigest() != sha256:
                raise OSError(f"its sha256 is {digest.hexdigest()}, not {sha256}")
            os.replace(partial, path)  # the final name appears only when the file is whole
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise OSError(
                f"cannot download {url} to {path} ({e}): put the file there, or name a folder that "
                f"holds {name} with --data_dir=FOLDER"
            ) from None
        finally:
            if os.path.exists(partial):
                os.remove(partial)
    return path


def read_text(path):
    """The text of a UTF-8 file, gunzipped if its name ends in .gz. Line ends become \\n."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            text = f.read().decode("utf-8").replace("\r\n", "\n")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def parallel(src_path, tgt_path):
    """
    Two files whose lines i translate each other -> [(source, target), ...]. Pairs with an empty side are
    dropped and counted; files of different length cannot be aligned and raise a ValueError.
    """
    src, tgt = (read_text(path).rstrip("\n").split("\n") for path in (src_path, tgt_path))
    if len(src) != len(tgt):
        raise ValueError(
            f"{src_path} has {len(src):,d} lines but {tgt_path} has {len(tgt):,d}: "
            "line i of one must translate line i of the other"
        )
    pairs = [(s.strip(), t.strip()) for s, t in zip(src, tgt)]
    kept = [(s, t) for s, t in pairs if s and t]
    if len(kept) < len(pairs):
        print(f"dropped {len(pairs) - len(kept):,d} pairs with an empty side: {src_path}, {tgt_path}")
    return kept


def run(main, file, doc, **flags):
    """
    Run main(args) as the script `file`. Its flags are --out_dir (default: the script's folder) and `flags`,
    {name: default}; a tuple lists the choices, default first. A user's error ends as one line on stderr and
    exit status 1.
    """
    fields = []
    for name, default in {"out_dir": os.path.dirname(os.path.abspath(file)), **flags}.items():
        first, choices = (default[0], default) if isinstance(default, tuple) else (default, None)
        about = f"one of {', '.join(choices)}" if choices else ""
        fields.append((name, type(first), flag(first, about, 0 if isinstance(first, int) else None, one_of=choices)))
    Settings = dataclasses.make_dataclass("Settings", fields)
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text((doc or "") + "\nFlags", Settings))
        return
    try:
        given = parse(sys.argv[1:], Settings)
        check(given, Settings)
        main(Settings(**given))
    except (OSError, ValueError) as e:
        text = " ".join(str(e).split())
        if isinstance(e, OSError) and e.strerror:  # nobody has said more about it than the system
            text = f"cannot use {e.filename or 'a file'} ({e.strerror}): mend that, or name another folder"
        sys.exit(f"error: {text}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run it again")
